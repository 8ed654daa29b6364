"""The policy: a model, an action distribution and a critic as one policy of Stable-Baselines3."""
