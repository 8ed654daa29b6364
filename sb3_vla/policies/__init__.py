"""The policy: a model, an action distribution and a critic as one policy of Stable-Baselines3."""

from sb3_vla.policies.loading import load_policy
from sb3_vla.policies.value_head import ValueHead
from sb3_vla.policies.vla_policy import NoVLAPolicy, VLAPolicy

__all__ = ["NoVLAPolicy", "VLAPolicy", "ValueHead", "load_policy"]
