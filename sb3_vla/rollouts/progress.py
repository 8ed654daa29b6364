"""The progress bar of ``learn``, with the present success rate."""

from __future__ import annotations

from stable_baselines3.common.callbacks import ProgressBarCallback
from stable_baselines3.common.utils import safe_mean


class SuccessBar(ProgressBarCallback):
    """Stable-Baselines3's progress bar, which counts decisions, with the success rate of the latest episodes."""

    def _on_rollout_end(self) -> None:
        if self.model.ep_success_buffer:
            self.pbar.set_description(f"success {safe_mean(self.model.ep_success_buffer):.0%}")
