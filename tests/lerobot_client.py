"""What LeRobot makes of a folder; run by LeRobot's own interpreter, see test_lerobot.py. It imports nothing of ours.

``act FOLDER INPUTS OUTPUTS`` writes the policy's actions, and the tokens that it read; ``eval FOLDER OPTIONS...`` is
lerobot-eval on episodes of two steps.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file

TOKENS, MASK = "observation.language.tokens", "observation.language.attention_mask"


def act(folder: str, inputs: str, outputs: str) -> None:
    import torch
    from lerobot.configs.policies import PreTrainedConfig
    from lerobot.policies.factory import get_policy_class, make_pre_post_processors

    config = PreTrainedConfig.from_pretrained(folder)
    config.device = "cpu"
    if config.type in ("pi0", "pi05"):
        shrink_pi0(config.type)
    before, after = make_pre_post_processors(config, pretrained_path=folder)
    policy = get_policy_class(config.type).from_pretrained(folder, config=config)
    given = load_file(inputs)
    with safe_open(inputs, "pt") as file:
        tasks = json.loads(file.metadata()["tasks"])
    batch = before({"observation.image": given["image"], "observation.state": given["state"], "task": tasks})
    if config.type == "diffusion":  # it takes a history, here of one observation
        batch |= {key: batch[key][:, None] for key in ("observation.image", "observation.state")}
    with torch.no_grad():
        actions = after(policy.predict_action_chunk(batch, noise=given["noise"]))
    read = {key: batch[key] for key in (TOKENS, MASK) if key in batch}
    save_file({"actions": actions.contiguous(), **read}, outputs)


def shrink_pi0(kind: str) -> None:
    """LeRobot's pi0 of the sizes of toy_pi0.py; it has no words for them."""
    import importlib

    module: Any = importlib.import_module(f"lerobot.policies.{kind}.modeling_{kind}")
    sizes = {"depth": 3, "num_heads": 8, "num_kv_heads": 1, "head_dim": 16}
    widths = {"gemma_2b": {"width": 64, "mlp_dim": 128}, "gemma_300m": {"width": 32, "mlp_dim": 64}}
    module.get_gemma_config = lambda variant: module.GemmaConfig(**widths[variant], **sizes)
    language, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def small_language(config: Any) -> Any:
        tower = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
        for name, value in {**tower, "projection_dim": 64}.items():
            setattr(config.vision_config, name, value)
        config.text_config.vocab_size = 512
        return language(config=config)

    def small_expert(config: Any) -> Any:
        config.vocab_size = 512
        return expert(config=config)

    module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM = small_language, small_expert


def evaluate(folder: str, options: list[str]) -> None:
    from lerobot.envs import metaworld
    from lerobot.scripts import lerobot_eval

    made = metaworld.MetaworldEnv.__init__

    def short(self: Any, *args: Any, **kwargs: Any) -> None:
        made(self, *args, **kwargs)
        self._max_episode_steps = 2

    metaworld.MetaworldEnv.__init__ = short
    sys.argv = ["lerobot-eval", f"--policy.path={folder}", *options]
    lerobot_eval.main()


if __name__ == "__main__":
    if sys.argv[1] == "act":
        act(*sys.argv[2:])
    else:
        evaluate(sys.argv[2], sys.argv[3:])
