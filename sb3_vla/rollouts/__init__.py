"""Rollouts of PPO and GRPO: stepping all environments, buffers, episode statistics, metrics."""
