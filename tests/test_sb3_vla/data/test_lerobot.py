"""Released LeRobot loads the folders that are written for it as they are, and acts as the models do.

It wants other versions of torch and NumPy than this package takes, so it has an environment of its own, which the tests
are told:

    python3.12 -m venv /path/to/lerobot
    /path/to/lerobot/bin/pip install "lerobot[smolvla,pi,diffusion,metaworld,evaluation]==0.6.1" "mujoco==3.3.0"
    LEROBOT_PYTHON=/path/to/lerobot/bin/python python -m pytest -m lerobot tests/test_sb3_vla/data/test_lerobot.py

Its MetaWorld, 3.0.0, fails with MuJoCo's later releases. lerobot-eval draws with OpenGL, by EGL or OSMesa. One test is
for LeRobot 0.4.4 with transformers 4.57 (``pip install "lerobot[smolvla]==0.4.4"``), whose interpreter
LEROBOT_044_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from published import recorded
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy import stir
from toy_pi0 import NAMES, reference_model, tiny_tokenizer

from mw_envs import encode_instruction
from sb3_vla.checkpoints import save_diffusion_policy
from sb3_vla.checkpoints.formats.pi0 import save_lerobot
from sb3_vla.checkpoints.formats.smolvla import load_smolvla, save_smolvla
from sb3_vla.distributions import make_distribution
from sb3_vla.distributions.base import integrate
from sb3_vla.models import DiffusionPolicy, SmolVLA, VLAModel

pytestmark = pytest.mark.lerobot

CLIENT = Path(__file__).parents[2] / "lerobot_client.py"
TOLERANCE = 2e-5  # of actions, in units of the environment
TASKS = ["open the door", "Push the puck to a goal.\n"]  # of different lengths; the second has its newline


@pytest.fixture(scope="module")
def python() -> str:
    found = os.environ.get("LEROBOT_PYTHON")
    if not found:
        pytest.fail("LEROBOT_PYTHON names no interpreter that has LeRobot; this file says how to install it")
    return found


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working directory in which a relative name leads nowhere."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def run(python: str, *arguments: Any, cwd: Path, **environment: str) -> str:
    # Nothing of ours, and no hub: what the folder lacks is not found.
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment = {**inherited, "HF_HUB_OFFLINE": "1", "HF_HOME": str(cwd / "hub"), **environment}
    command = [python, str(CLIENT), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def observed(size: int, tasks: list[str]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "image": torch.randint(0, 256, (len(tasks), 3, size, size), generator=generator, dtype=torch.uint8),
        "state": torch.rand(len(tasks), 4, generator=generator),
        "instruction": torch.stack([torch.from_numpy(encode_instruction(task)) for task in tasks]),
    }


def lerobots(python: str, folder: Path, observation: dict[str, Tensor], noise: Tensor, cwd: Path) -> dict[str, Tensor]:
    """Actions, and tokens with their mask, that LeRobot makes of an observation."""
    given = {"image": observation["image"].float() / 255, "state": observation["state"], "noise": noise}
    save_file(given, cwd / "inputs.safetensors", metadata={"tasks": json.dumps(TASKS)})
    run(python, "act", folder, cwd / "inputs.safetensors", cwd / "outputs.safetensors", cwd=cwd)
    return load_file(cwd / "outputs.safetensors")


@torch.no_grad()
def assert_acts_alike(python: str, folder: Path, model: VLAModel, cwd: Path, tolerance: float = TOLERANCE) -> None:
    observation = observed(model.image_size[0], TASKS)
    noise = torch.randn(2, model.action_horizon, model.latent_dim, generator=torch.Generator().manual_seed(1))
    theirs = lerobots(python, folder, observation, noise, cwd)
    if isinstance(model, SmolVLA):
        tokens, mask = model.tokenize(observation["instruction"])
    else:
        tokens, mask = model.read_prompt(observation)  # type: ignore[operator]
    found, there = theirs["observation.language.tokens"], theirs["observation.language.attention_mask"]
    assert torch.equal(there, mask) and torch.equal(found * there, tokens * mask)
    ours = integrate(model, model.encode(observation), noise, 10)[..., : model.action_dim]
    ours = model.unnormalize_action(ours)
    difference = (theirs["actions"] - ours).abs().max()
    print(f"{folder.name}: {difference:.1e} where the largest action is {ours.abs().max():.1f}")
    assert difference <= tolerance


def smolvla(**options: Any) -> SmolVLA:
    """Of a size of its own, with a tokenizer of its own and the recorded weights' scale."""
    torch.manual_seed(0)
    sizes = {"width": 48, "ffn": 96, "heads": 3, "kv_heads": 1, "head_dim": 16, "vocabulary": 264, "image_size": 32}
    sizes |= {"patch_size": 8, "vision_width": 32, "vision_ffn": 64, "vision_layers": 1, "vision_heads": 2, "scale": 2}
    model = SmolVLA(**{"vlm": sizes, "layers": 2, "image_size": 64, "action_horizon": 6, **options}).eval()
    model.set_statistics({"state_mean": torch.rand(4), "action_mean": torch.rand(4), "action_std": torch.rand(4) + 1})
    return model


@pytest.mark.parametrize(
    "options",
    [{}, {"image_special_tokens": True, "absent_pictures": 1}, {"train_expert_only": True, "self_attn_every": 3}],
    ids=["plain", "marks", "expert"],
)
def test_smolvla_of_its_own_size(python: str, tmp_path: Path, elsewhere: Path, options: dict[str, Any]) -> None:
    model = smolvla(**options)
    save_smolvla(tmp_path / "smolvla", model)
    assert_acts_alike(python, tmp_path / "smolvla", model, elsewhere)


def test_smolvla_in_mixed_precision(python: str, tmp_path: Path, elsewhere: Path) -> None:
    model = smolvla(precision="mixed")
    save_smolvla(tmp_path / "smolvla", model)
    assert_acts_alike(python, tmp_path / "smolvla", model, elsewhere, tolerance=0.1)


@pytest.mark.skipif("LEROBOT_044_PYTHON" not in os.environ, reason="LEROBOT_044_PYTHON names no interpreter")
def test_smolvla_where_positions_are_shifted(tmp_path: Path, elsewhere: Path) -> None:
    model = smolvla()
    stir(model, 0.2)
    save_smolvla(tmp_path / "smolvla", model)
    shifted = load_smolvla(tmp_path / "smolvla", shifted_positions=True).model.eval()
    assert_acts_alike(os.environ["LEROBOT_044_PYTHON"], tmp_path / "smolvla", shifted, elsewhere)


def test_smolvla_as_lerobot_wrote_it(python: str, tmp_path: Path, elsewhere: Path) -> None:
    """By a relative path: the folder is written, and then read from another directory."""
    _, records = recorded("smolvla")
    model = smolvla(tokenizer=json.dumps(records["files"]["vlm/tokenizer.json"]))
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        save_smolvla("smolvla", model)
    finally:
        os.chdir(before)
    assert_acts_alike(python, tmp_path / "smolvla", model, elsewhere)


@pytest.mark.parametrize("name", NAMES)
def test_pi0_with_a_tokenizer_that_has_no_template(python: str, tmp_path: Path, elsewhere: Path, name: str) -> None:
    tokenizer = str(tiny_tokenizer(tmp_path / "tokenizer"))
    model = reference_model(name, convention="lerobot", tokenizer=tokenizer).eval()
    with pytest.warns(UserWarning, match="LeRobot cannot load"):  # by its own words for sizes
        save_lerobot(tmp_path / name, model)
    assert_acts_alike(python, tmp_path / name, model, elsewhere)


def test_pi05_without_the_state(python: str, tmp_path: Path, elsewhere: Path) -> None:
    tokenizer = str(tiny_tokenizer(tmp_path / "tokenizer"))
    model = reference_model("pi05", convention="lerobot", tokenizer=tokenizer, discrete_state_input=False).eval()
    save_lerobot(tmp_path / "pi05", model)
    assert_acts_alike(python, tmp_path / "pi05", model, elsewhere)


@torch.no_grad()
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_diffusion_policy_of_lerobots_widths(python: str, tmp_path: Path, elsewhere: Path, norm: str) -> None:
    sizes = {"widths": (64, 128, 256, 512), "down_dims": (32, 64), "instruction_dim": 0}
    model = DiffusionPolicy(action_horizon=8, image_size=64, crop_size=56, norm=norm, **sizes).eval()
    stir(model)
    sampler = {"denoising_steps": 5, "clip_sample": 1.0}
    save_diffusion_policy(tmp_path / "policy", model, ("ddim", sampler))
    observation = observed(64, TASKS)
    noise = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))
    theirs = lerobots(python, tmp_path / "policy", observation, noise, elsewhere)["actions"]
    chain, context, x = make_distribution("ddim", model, 8, eta=0.0, **sampler), model.encode(observation), noise
    for step in range(5):
        x = chain.kernel(model, context, x, torch.full((2,), step))[2]  # type: ignore[operator]
    assert (theirs - chain.executed_actions(model, x)).abs().max() <= TOLERANCE


def test_lerobot_eval(python: str, opengl: str, tmp_path: Path, elsewhere: Path) -> None:
    save_smolvla(tmp_path / "smolvla", smolvla(image_size=480))
    options = ["--env.type=metaworld", "--env.task=reach-v3", "--eval.n_episodes=1", "--eval.batch_size=1"]
    run(python, "eval", tmp_path / "smolvla", *options, "--output_dir=out", cwd=elsewhere, MUJOCO_GL=opengl)
    told = json.loads((elsewhere / "out" / "eval_info.json").read_text())
    assert told["overall"]["n_episodes"] == 1
