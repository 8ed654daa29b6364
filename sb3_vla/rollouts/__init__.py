"""What PPO and GRPO collect: one step of all environments, buffers, metrics."""
