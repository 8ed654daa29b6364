"""The policy: a model, an action distribution and a critic as one policy of Stable-Baselines3."""

from sb3_vla.policies.vla_policy import NoVLAPolicy, VLAPolicy, load_policy

__all__ = ["NoVLAPolicy", "VLAPolicy", "load_policy"]
