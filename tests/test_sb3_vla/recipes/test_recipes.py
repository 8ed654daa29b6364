"""Recipes: every key that is taken is used, every recipe resolves, and what is wrong is told in one message."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import typing
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import yaml
from toy_pi0 import TINY_PI0, tiny_tokenizer

from mw_envs.hand_view import HandView
from sb3_vla.checkpoints import save_checkpoint, save_diffusion_policy, save_tinyvla
from sb3_vla.checkpoints.formats.openvla_oft import save_openvla_oft
from sb3_vla.checkpoints.formats.pi0 import save_openpi
from sb3_vla.checkpoints.formats.smolvla import save_smolvla
from sb3_vla.cli.main import main
from sb3_vla.common.config import ConfigError, leaf_keys, leaves, read_layers
from sb3_vla.distributions import make_distribution
from sb3_vla.models import VLAModel, make_model
from sb3_vla.models.lora import adapted_layers
from sb3_vla.models.sizes import PUBLISHED_SIZES, published_options
from sb3_vla.recipes.memory import footprint
from sb3_vla.recipes.resolve import Plan, make_plan
from sb3_vla.recipes.schema import RECIPES, Recipe, find_recipe, given_keys, load_recipe, recipe_names, summary
from sb3_vla.runs import memory_plan
from sb3_vla.runs.settings import Annealed
from sb3_vla.runs.training import plan_training

NAMES = recipe_names()
WANTED = [
    "env.train.video_cfg.save_video=true",
    'cluster.component_placement={"actor,env,rollout": all}',
    "actor.optim.lr_scheduler=linear",
]
#: what a user has set up, so that as many keys as possible mean something
CONTEXTS = {
    "ppo": ("metaworld_50_ppo_compact", ["env.train.use_rel_reward=true", *WANTED]),
    "grpo": ("metaworld_50_grpo_compact", ["algorithm.filter_rewards=true", "env.train.use_rel_reward=true", *WANTED]),
    "sft": ("metaworld_50_sft_compact", []),
    "sft of a checkpoint": ("metaworld_50_sft_openpi", ["actor.model.model_path=somewhere", "data.path=data"]),
    "ppo of a checkpoint": (
        "metaworld_50_ppo_openpi",
        # A size that divides the rollout of longer chunks too.
        ["actor.model.model_path=somewhere", "actor.global_batch_size=1280", *WANTED],
    ),
}
#: another value where none follows from the type, or not every one is allowed
OTHERS: dict[str, Any] = {
    "actor.global_batch_size": 256,  # divides each recipe's rollout
    "runner.logger.logger_backends": ["csv"],
    "runner.val_check_interval": 2,
    "cluster.component_placement": {"actor,env,rollout": "0"},
    "rollout.pipeline_stage_num": 2,
    "algorithm.group_size": 4,
    "env.train.task_suite_name": "metaworld_45_ind",
    "env.eval.task_suite_name": "metaworld_45_ood",
    "env.train.tasks": ["reach-v3"],
    "env.eval.tasks": ["reach-v3"],
    "actor.model.model_type": "smolvla",
    "actor.model.model_kwargs": {"image_size": 64},
    "actor.model.crop": "workspace",
    "actor.model.camera": "corner",
    "actor.model.lora": {"rank": 4},
    "actor.model.noise_kwargs": {"std": 0.7},
    "actor.model.compile": {"mode": "reduce-overhead"},
    "data.rename": {"observation.images.top": "observation.image"},
    "data.instruction_bytes": 128,
    "sft.precision": "bf16",
}


REFUSALS = ("without effect", "is for algorithm.adv_type=gae", "bounds a reward of success")


@pytest.fixture
def unplayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory plans leave out what an update holds besides weights, which takes seconds to find out; that it is the
    same for models that are alike is all that counts where this fixture is used. It is tested in runs/test_memory.py.
    """

    def play(model: VLAModel, *settings: Any) -> Any:
        found = sum(parameter.numel() for parameter in model.parameters())
        return memory_plan._Played(found, found, found, found, found)

    monkeypatch.setattr(memory_plan, "_PLAYED", {})
    monkeypatch.setattr(memory_plan, "_play", play)


def plan_of(name: str, overrides: list[str]) -> Plan:
    return make_plan(load_recipe(name, overrides), given_keys(name, overrides))


def start_of(name: str) -> str:
    """The override that says where a recipe starts; what takes any model's checkpoint must find one there."""
    return f"checkpoint={'compact-mt50' if load_recipe(name).actor.model.model_type is None else 'somewhere'}"


def settings(plan: Plan) -> Any:
    """All arguments of a training side by side."""
    training = plan.training
    assert training is not None
    return SimpleNamespace(**{**vars(training), **training.env, **training.policy, **training.arguments})


def another(key: str, hint: Any, value: Any) -> Any:
    """A value of the key's type that is not the present one."""
    if key in OTHERS:
        return OTHERS[key]
    kinds = [kind for kind in typing.get_args(hint) or (hint,) if kind is not type(None)]
    if typing.get_origin(hint) is typing.Literal:
        return next(kind for kind in kinds if kind != value)
    if kinds[0] is bool:
        return not value
    if kinds[0] in (int, float):
        return kinds[0](2 * value) if value else kinds[0](1)
    assert kinds[0] is str, f"{key} needs a line in OTHERS"
    return "other"


@pytest.mark.parametrize("context", CONTEXTS)
def test_every_key_that_is_taken_changes_what_is_done(context: str) -> None:
    name, given = CONTEXTS[context]
    before = plan_of(name, given)
    used = set()
    for key, hint in leaf_keys(Recipe):
        recipe = load_recipe_once(name, *given)
        *sections, last = key.split(".")
        section = functools.reduce(getattr, sections, cast(Any, recipe))
        value = another(key, hint, getattr(section, last))
        setattr(section, last, value)
        try:
            after = make_plan(recipe, [key])
        except ConfigError as error:
            assert any(reason in str(error) for reason in REFUSALS), f"{key}: {error}"
            continue
        assert after != before, f"{key}={value!r} was taken, and changed nothing in {name}"
        used.add(key)
    assert used == expected_keys(context)


def load_recipe_once(name: str, *given: str) -> Recipe:
    return copy.deepcopy(_cached_recipe(name, given))


@functools.cache
def _cached_recipe(name: str, given: tuple[str, ...]) -> Recipe:
    return load_recipe(name, given)


def expected_keys(context: str) -> set[str]:
    """What must be usable; together all of them."""
    keys = {key for key, _ in leaf_keys(Recipe)}
    of_gae = {
        "algorithm.gamma",
        "algorithm.gae_lambda",
        "algorithm.normalize_advantages",
        "algorithm.value_clip",
        "algorithm.huber_delta",
        "algorithm.critic_warmup",
        "actor.model.privileged_critic",
        "actor.optim.value_lr",
        "rollout.pipeline_stage_num",
    }
    of_grpo = {
        "algorithm.group_size",
        "algorithm.filter_rewards",
        "algorithm.rewards_lower_bound",
        "algorithm.rewards_upper_bound",
        "algorithm.normalize_length",
    }
    data = {key for key in keys if key.startswith("data.")}
    sft = {key for key in keys if key.startswith("sft.")}
    by_experts = {"data.episodes_per_task", "data.horizon", "data.noise_std", "data.crop"}
    of_others = {"data.rename", "data.instruction_bytes"}
    learning = {key for key in keys if key.startswith(("algorithm.", "rollout.", "actor.optim."))}
    learning |= {f"actor.model.{name}" for name in ("trainable", "noise_method", "num_steps", "noise_level")}
    learning |= {f"actor.model.{name}" for name in ("joint_logprob", "noise_kwargs", "final_noise_scale")}
    both = {f"actor.model.{name}" for name in ("lora", "gradient_checkpointing")}
    learning |= {f"actor.model.{name}" for name in ("frozen_bf16", "compile")} | both
    learning |= {"actor.model.cache_perception"}
    learning |= {f"runner.logger.{name}" for name in ("project_name", "logger_backends", "mode")}
    learning |= {"actor.model.privileged_critic", "actor.global_batch_size", "actor.micro_batch_size"}
    of_a_checkpoint = {"actor.model.crop", "actor.model.camera"}
    learning |= of_a_checkpoint
    learning |= {
        "runner.keep_checkpoints",
        "actor.sharding",
        "runner.max_epochs",
        "runner.save_interval",
        "runner.val_check_interval",
        "env.train.video_interval",
        *(key for key in keys if key.startswith(("env.train.video_cfg.", "cluster."))),
        "env.train.total_num_envs",
        "env.train.reward_coef",
    }
    learning |= {
        "env.train.dense_reward",
        "env.train.max_episode_steps",
        "env.train.use_rel_reward",
        "env.train.ignore_terminations",
    }
    return {
        "ppo": keys - of_grpo - of_a_checkpoint - of_others,
        "grpo": keys - of_gae - of_a_checkpoint - of_others - {"env.train.dense_reward"},
        "sft": (keys - learning - of_others) | both,
        "sft of a checkpoint": (keys - learning - by_experts - {"env.train.num_workers", "env.train.renderer"}) | both,
        "ppo of a checkpoint": keys - of_grpo - data - sft - {"algorithm.rehearsal_batch_size"},
    }[context]


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_resolves_and_says_what_it_is_for(name: str) -> None:
    start = start_of(name)
    plan = plan_of(name, [start])
    if name != "quickstart":  # which imitates first where it is not told a start
        _, own = read_layers(find_recipe(name), RECIPES)[-1]
        make_plan(load_recipe(name, [start]), leaves(own))  # without a key that has no effect
    assert plan.run == Path("runs") / name
    assert plan.checkpoint == start.removeprefix("checkpoint=")
    kind = {"quickstart": "ppo"}.get(name) or name.removeprefix("metaworld_50_").removeprefix("metaworld_45_").split(
        "_"
    )[0]
    assert ("sft" if plan.training is None else plan.training.name) == kind
    assert len(summary(name)) > 20
    if name.startswith("metaworld_45"):
        assert (plan.where["suite"], plan.where["split"]) == ("ML45", "train")
        assert plan.evaluate is not None and len(plan.evaluate["tasks"]) == 5
        assert not set(plan.evaluate["tasks"]) & set(plan.where["tasks"] or [])


def test_the_names_are_those_of_the_reference_and_their_counterparts() -> None:
    reference = {f"metaworld_50_ppo_{model}" for model in ("openpi", "openpi_pi05")}
    reference |= {"metaworld_45_ppo_openpi", "metaworld_50_grpo_openvlaoft"}
    ours = {f"metaworld_{suite}_{kind}_compact" for suite in (45, 50) for kind in ("ppo", "grpo")}
    ours |= {"metaworld_50_grpo_openpi", "metaworld_50_grpo_openpi_pi05", "metaworld_45_grpo_openpi"}
    others = ("smolvla", "diffusion_policy", "tinyvla", "openvlaoft")
    every = ("ppo", "grpo", "sft")
    ours |= {f"metaworld_50_{kind}_{model}{size}" for kind in every for model in others for size in ("", "_laptop")}
    ours |= {f"metaworld_50_sft_{model}" for model in ("compact", "openpi", "openpi_pi05")}
    ours |= {"metaworld_50_grpo_openvlaoft_lora", "quickstart", "ppo", "grpo"}
    assert set(NAMES) == reference | ours


def test_a_checkpoint_that_does_not_say_its_view_is_told_it() -> None:
    view = ["actor.model.crop=workspace", "actor.model.camera=corner"]
    for name in ("metaworld_50_ppo_openpi", "metaworld_50_grpo_compact"):
        plan = plan_of(name, ["actor.model.model_path=somewhere", *view])
        assert settings(plan).env.items() >= {"crop": "workspace", "camera": "corner"}.items()


def test_the_settings_of_the_reference() -> None:
    """RLinf's metaworld_50_ppo_openpi.yaml: 64 x 8 episodes of 20 decisions, 20 optimizer steps."""
    plan = plan_of("metaworld_50_ppo_openpi", ["actor.model.model_path=somewhere"])
    config = settings(plan)
    assert config.num_envs * config.n_steps == 10_240
    assert config.num_envs * config.n_steps // config.batch_size * config.n_epochs == 20
    assert (config.learning_rate, config.value_lr) == (1e-5, 1e-4)
    assert (config.clip_range, config.clip_range_high, config.clip_range_vf, config.huber_delta) == (0.2, 0.2, 0.2, 10)
    assert (config.gamma, config.gae_lambda, config.max_grad_norm, config.seed) == (0.99, 0.95, 1.0, 42)
    assert config.distribution == "flow_sde"
    assert config.distribution_kwargs == {"denoising_steps": 5, "noise_level": 0.5}
    assert config.frozen_bf16 and config.bf16 is None  # on a GPU all is in bfloat16
    assert config.env == {
        "horizon": 100,
        "reward": "difference",
        "reward_coef": 1.0,
        "terminate_on_success": True,
        "action_chunk": 5,
        "privileged_state": False,
    }
    assert config.optimizer_kwargs == {"betas": (0.9, 0.95), "eps": 1e-5, "weight_decay": 0.01}
    assert plan.evaluate is not None and plan.evaluate["protocol"].name == "rlinf-100"
    assert plan_of("metaworld_45_ppo_openpi", []).evaluate["protocol"].name == "rlinf-160"  # type: ignore[index]


def test_the_learning_rate_of_the_reference_s_pi05() -> None:
    """RLinf's metaworld_50_ppo_openpi_pi05.yaml: half a cosine from 5e-6 to 0 over max_epochs, without a warm-up."""
    plan = plan_of("metaworld_50_ppo_openpi_pi05", [])
    config, iterations = settings(plan), load_recipe("metaworld_50_ppo_openpi_pi05").runner.max_epochs
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1], "lr": 5e-6}, {"params": parameters[1:], "lr": 1e-4}]
    optimizer = torch.optim.SGD(groups)  # type: ignore[arg-type]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    rate = config.learning_rate
    assert config.actor_warmup == 0
    for number in range(iterations):
        # Ours is read after the rollout, so an update's is what the reference's falls to at its end.
        optimizer.step()
        scheduler.step()
        actor, critic = (group["lr"] for group in optimizer.param_groups)
        found = rate(1 - (number + 1) / iterations)
        assert found == pytest.approx(actor, rel=1e-3, abs=1e-12)
        assert found * config.value_lr / rate(1.0) == pytest.approx(critic, rel=1e-3, abs=1e-12)


def test_older_names_of_a_schedule() -> None:
    overrides = ["actor.optim.warmup_style=cosine", "actor.optim.min_lr=1e-7"]
    rate = settings(plan_of("metaworld_50_ppo_openpi", overrides)).learning_rate
    assert rate == Annealed(1e-5, 1e-7, "cosine")
    with pytest.raises(ConfigError, match=r"final_lr would be without effect"):
        plan_of("metaworld_50_ppo_openpi", ["actor.optim.min_lr=1e-7"])


def test_names_of_the_reference_are_understood_or_refused_with_a_reason() -> None:
    name = "metaworld_50_ppo_openpi"
    recipe = load_recipe(name, ["actor.model.openpi.noise_level=0.3", "rollout.model.model_path=somewhere"])
    assert (recipe.actor.model.noise_level, recipe.actor.model.model_path) == (0.3, "somewhere")
    known = dict(leaf_keys(Recipe))
    for keys in Recipe.ALIASES.values():
        assert {keys} if isinstance(keys, str) else set(keys) <= set(known)
    for key, reason in Recipe.REFUSED.items():
        assert key not in known
        with pytest.raises(ConfigError, match="is not taken here") as refusal:
            load_recipe(name, [f"{key}=1"])
        assert reason in str(refusal.value)


def test_the_settings_of_the_reference_for_openvla_oft() -> None:
    """RLinf's metaworld_50_grpo_openvlaoft.yaml: 64 x 16 episodes of 100 decisions, 8 optimizer steps."""
    plan = plan_of("metaworld_50_grpo_openvlaoft", ["actor.model.model_path=somewhere"])
    config = settings(plan)
    episodes = config.n_groups * config.group_size
    assert (config.group_size, episodes, config.horizon, plan.action_chunk) == (8, 64 * 16, 100, 1)
    assert config.total_decisions == 1000 * 102_400
    assert (episodes * config.horizon / config.batch_size * config.n_epochs, config.micro_batch_size) == (8, 32)
    assert (config.clip_range, config.clip_range_high, config.dual_clip) == (0.2, 0.28, 3.0)
    assert (config.kl_coef, config.ent_coef, config.max_grad_norm) == (0.0, 0.0, 1.0)
    assert (config.logprob_type, config.normalize_length, config.gradient_checkpointing) == ("token", False, True)
    assert (config.distribution, config.distribution_kwargs) == ("tokens", {"temperature": 1.6})
    assert config.learning_rate == 2e-5
    assert config.optimizer_kwargs["betas"] == (0.9, 0.999)
    assert config.reward_coef == 5.0


@functools.cache
def _laptop_model(kind: str) -> VLAModel:
    return make_model(kind, plan_of(f"metaworld_50_sft_{kind.replace('_oft', 'oft')}_laptop", []).model_kwargs)


@pytest.mark.parametrize(
    "name",
    [n for n in NAMES if n.startswith("metaworld") and not any(kind in n for kind in ("_sft_", "openpi", "compact"))],
)
def test_what_a_recipe_explores_by_can_train_what_it_trains(name: str) -> None:
    """Found before demonstrations, imitation and hours of it: here on a model of laptop size."""
    plan = plan_of(name, ["actor.model.model_path=somewhere"])
    config = settings(plan)
    model = _laptop_model(plan.model)
    model.set_trainable(config.trainable)
    chunk = min(plan.action_chunk, model.action_horizon)
    distribution = make_distribution(config.distribution, model, chunk, **config.distribution_kwargs)
    distribution.check_trainable(model)


@pytest.mark.parametrize("kind", ["smolvla", "diffusion_policy", "tinyvla", "openvlaoft"])
def test_how_a_checkpoint_is_read_makes_no_new_model(kind: str) -> None:
    assert not plan_of(f"metaworld_50_ppo_{kind}", []).begins
    # Diffusion Policy alone is imitated from nothing at full size.
    assert plan_of(f"metaworld_50_sft_{kind}", []).begins == (kind == "diffusion_policy")
    assert plan_of(f"metaworld_50_sft_{kind}_laptop", []).begins


def test_group_bounds_are_of_the_reward() -> None:
    plan = plan_of("metaworld_50_grpo_openvlaoft", [])
    assert isinstance(settings(plan).success_bounds, tuple)
    assert settings(plan).success_bounds == pytest.approx((0.1, 0.9))
    told = r"keep no group of algorithm\.group_size=8 .* a success earns 5, .* 0\.5 and 4\.5"
    with pytest.raises(ConfigError, match=told):
        plan_of("metaworld_50_grpo_openvlaoft", ["algorithm.rewards_upper_bound=0.5"])
    with pytest.raises(ConfigError, match=r"keep no group"):
        plan_of("metaworld_50_grpo_openpi", ["algorithm.rewards_lower_bound=1.5", "algorithm.rewards_upper_bound=4.5"])


@pytest.mark.parametrize("name", [name for name in NAMES if "_grpo_" in name])
def test_a_group_in_which_some_succeed_and_some_fail_counts(name: str) -> None:
    config = settings(plan_of(name, ["actor.model.model_path=somewhere"]))
    low, high = config.success_bounds
    counted = [successes for successes in range(1, config.group_size) if low <= successes / config.group_size <= high]
    assert counted == list(range(1, config.group_size))


@pytest.mark.parametrize("name", [name for name in NAMES if "_ppo_" in name])
def test_the_clip_of_values_is_of_the_size_of_returns(name: str) -> None:
    plan = plan_of(name, ["actor.model.model_path=somewhere"])
    config = settings(plan)
    greatest = config.env.get("reward_coef", 1.0)
    assert config.clip_range_vf is None or config.clip_range_vf >= 0.2 * greatest


@pytest.mark.parametrize("name", [name for name in NAMES if "_sft_diffusion_policy" in name])
def test_diffusion_policy_s_random_crop_is_a_shift_before_the_crop(name: str) -> None:
    plan = plan_of(name, [])
    assert plan.sft is not None and plan.load is not None
    size = plan.load["image_size"]
    assert plan.sft.shift == ((size - plan.model_kwargs["crop_size"]) // 2 if "crop_size" in plan.model_kwargs else 2)


def test_the_examples_folder_shows_the_package_s_recipes() -> None:
    shown = Path(__file__).parents[3] / "examples" / "embodiment" / "config"
    assert shown.is_dir() and shown.resolve() == RECIPES.resolve()


def test_a_recipe_of_one_s_own_builds_on_another(tmp_path: Path) -> None:
    own = tmp_path / "mine.yaml"
    own.write_text(f"base: {RECIPES}/metaworld_50_ppo_compact.yaml\nactor: {{seed: 7}}\n")
    recipe = load_recipe(str(own), ["runner.max_epochs=3"])
    packaged = load_recipe("metaworld_50_ppo_compact", ["runner.max_epochs=3", "actor.seed=7"])
    assert recipe.runner.logger.experiment_name == "mine"
    recipe.runner.logger.experiment_name = packaged.runner.logger.experiment_name
    assert recipe == packaged


def test_the_package_s_recipes_can_be_built_on_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their names as README has it; one's own file of the same name comes first, and may itself build on it."""
    name = "metaworld_50_ppo_compact"
    packaged = load_recipe(name, ["actor.seed=7"])
    packaged.runner.logger.experiment_name = "mine"
    (tmp_path / "mine.yaml").write_text(f"base: {name}.yaml\nactor: {{seed: 7}}\n")
    (tmp_path / "elsewhere").mkdir()
    for folder in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(folder)
        assert load_recipe(str(tmp_path / "mine.yaml")) == packaged
        assert load_recipe(f"{name}.yaml", ["actor.seed=7", "runner.logger.experiment_name=mine"]) == packaged
    assert given_keys(str(tmp_path / "mine.yaml")) == ["actor.seed"]
    (tmp_path / f"{name}.yaml").write_text(f"base: {name}.yaml\nactor: {{optim: {{lr: 0.5}}}}\n")
    mine = load_recipe(str(tmp_path / "mine.yaml"))
    assert (mine.actor.seed, mine.actor.optim.lr) == (7, 0.5)
    mine.actor.optim.lr = packaged.actor.optim.lr
    assert mine == packaged


def test_a_base_may_lie_in_a_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("actor: {seed: 7}\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine.yaml").write_text("base: ~/base.yaml\n")
    assert load_recipe("~/folder/mine.yaml").actor.seed == 7
    run = make_plan(load_recipe("metaworld_50_ppo_compact", ["runner.logger.log_path=~/runs"])).run
    assert run == tmp_path / "runs" / "metaworld_50_ppo_compact"


def test_short_names_of_everyday_settings(tmp_path: Path) -> None:
    run = tmp_path / "my runs" / "2024"
    short = ["tasks=[reach-v3]", "suite=metaworld_50", f"run={run}", "seed=3", "iterations=7", "learning_rate=0.5"]
    short += ["num_envs=4", "trials=2", "renderer=software", "checkpoint=somewhere", "crop=full", "camera=corner"]
    recipe = load_recipe("metaworld_50_ppo_compact", short)
    assert (recipe.env.train.tasks, recipe.env.eval.tasks) == (["reach-v3"], ["reach-v3"])
    assert (recipe.env.train.task_suite_name, recipe.env.eval.task_suite_name) == ("metaworld_50", "metaworld_50")
    assert (recipe.env.train.renderer, recipe.env.eval.renderer) == ("software", "software")
    assert (recipe.actor.seed, recipe.runner.max_epochs, recipe.actor.optim.lr) == (3, 7, 0.5)
    assert (recipe.actor.model.crop, recipe.actor.model.camera) == ("full", "corner")
    assert (recipe.env.train.total_num_envs, recipe.env.eval.trials_per_task) == (4, 2)
    assert make_plan(recipe, given_keys("metaworld_50_ppo_compact", short)).run == run


def test_short_names_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("base: quickstart.yaml\ntasks: [reach-v3]\nseed: 7\n")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    assert (recipe.env.train.tasks, recipe.env.eval.tasks, recipe.actor.seed) == (["reach-v3"], ["reach-v3"], 7)
    with pytest.raises(ConfigError, match="did you mean 'tasks'"):
        load_recipe("quickstart", ["taks=[reach-v3]"])


def test_a_run_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_of("quickstart", []).run == Path("runs/quickstart")
    assert plan_of("quickstart", ["seed=1"]).run == Path("runs/quickstart-seed1")
    assert plan_of("quickstart", ["seed=1", "run='runs/q'"]).run == Path("runs/q")
    assert plan_of("quickstart", ["run=runs/q/"]).run == Path("runs/q")
    monkeypatch.chdir(tmp_path)
    assert plan_of("quickstart", ["run=."]).run == tmp_path
    for nothing in ("run=", "run=/", "run= "):
        with pytest.raises(ConfigError, match="is no folder for a run"):
            load_recipe("quickstart", [nothing])


def test_a_new_model_of_a_full_size_recipe_is_trained_whole() -> None:
    """pi0 that starts from nothing has no backbone that could stay as it is."""
    plan = plan_of("metaworld_50_ppo_openpi", ["actor.model.model_kwargs={vocabulary: 1000}"])
    assert plan.sft is not None
    found = (plan.sft.trainable, plan.sft.steps, plan.sft.batch_size, plan.sft.learning_rate, plan.sft.warmup_steps)
    assert found == ("all", 20_000, 64, 2.5e-5, 1000)


@pytest.mark.parametrize(
    ("given", "bf16"),
    [([], False), (["actor.model.precision=bf16"], True), (["actor.model.precision=bf16", "sft.precision=auto"], None)],
)
def test_imitation_has_the_model_s_precision_or_its_own(given: list[str], bf16: bool | None) -> None:
    plan = plan_of("metaworld_50_sft_openpi", ["checkpoint=somewhere", *given])
    assert plan.sft is not None and plan.sft.bf16 is bf16


@pytest.mark.parametrize("name", ["ppo", "grpo"])
def test_the_chunk_is_the_checkpoint_s(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"width": 64, "depth": 1, "channels": [8, 8, 16], "image_size": 32}
    save_checkpoint(tmp_path / "start", make_model("compact", {**options, "action_horizon": 3}))
    start = f"checkpoint={tmp_path / 'start'}"
    plan = plan_of(name, [start, "actor.global_batch_size=576"])
    assert (plan.action_chunk, settings(plan).action_chunk) == (3, 3)
    assert main(["train", name, start, "actor.model.num_action_chunks=5", f"run={tmp_path / 'run'}"]) == 2
    assert "num_action_chunks=5, but the model of" in " ".join(capsys.readouterr().err.split())


def test_the_quickstart_is_what_was_measured() -> None:
    """docs/results/ablations.md: the row of MT10 after PPO."""
    plan = plan_of("quickstart", [])
    config = settings(plan)
    assert plan.collect is not None and plan.sft is not None and plan.evaluate is not None
    assert (plan.collect["episodes_per_task"], plan.collect["horizon"], plan.collect["seed"]) == (30, 160, 0)
    assert (plan.sft.steps, plan.sft.batch_size, plan.sft.learning_rate, plan.sft.bf16) == (1000, 128, 1e-3, None)
    assert (config.num_envs, config.n_steps, config.batch_size, config.n_epochs) == (16, 128, 512, 4)
    assert config.total_decisions == 50 * 16 * 128
    assert (config.learning_rate, config.value_lr) == (Annealed(5e-5, 2e-5), 5e-4)
    assert config.distribution_kwargs == {"std": [0.12, 0.12, 0.12, 0.15], "coherence": "offset"}
    assert (config.noise_scale, config.rehearsal_coef) == (Annealed(1.0, 0.4), 0.5)
    assert (config.reward, config.privileged_state, config.bf16) == ("sparse", True, False)
    assert (plan.evaluate["trials_per_task"], plan.evaluate["protocol"].name) == (30, "rlinf-160")
    assert len(plan.evaluate["tasks"]) == 10


def test_a_dry_run_prints_settings_that_read_back(
    unplayed: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    name = "metaworld_50_ppo_openpi_pi05"
    assert main(["train", name, "--dry-run", "actor.seed=7"]) == 0
    text = capsys.readouterr().out
    (tmp_path / "recipe.yaml").write_text(text.split("\n\n")[0])
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["actor"]["seed"] == 7
    assert load_recipe(str(tmp_path / "recipe.yaml")) == load_recipe(name, ["actor.seed=7"])


def test_the_list_names_every_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["metaworld_50_pp_openpi"], "did you mean 'metaworld_50_ppo_openpi'"),
        (["nowhere.yaml"], "cannot read the configuration nowhere.yaml"),
        (["metaworld_50_ppo_openpi"], "actor.model.model_path is not set: pi0 starts from a checkpoint"),
        (["metaworld_50_ppo_openpi", "actor.model.model_path=nowhere"], "nowhere does not exist"),
        (["metaworld_50_ppo_compact", "actor.model.crop=workspace"], "actor.model.crop would be without effect"),
        (["metaworld_50_ppo_openpi", "actor.model.model_path=nowhere", "actor.model.crop=w"], "Unknown crop 'w'"),
        (["metaworld_50_ppo_compact", "actor.optim.lrr=1"], "did you mean 'actor.optim.lr'"),
        (["metaworld_50_ppo_compact", "algorithm.group_size=4"], "algorithm.group_size would be without effect"),
        (["metaworld_50_ppo_compact", "actor.fsdp_config.strategy=fsdp"], "start under torchrun"),
        (["metaworld_50_ppo_compact", "env.train.task_suite_name=metaworld_5"], "did you mean 'metaworld_50'"),
        (["metaworld_50_ppo_compact", "env.train.tasks=[reach-v4]"], "env.train.tasks: "),
        (["metaworld_50_ppo_compact", "actor.model.model_type=openpi"], "pi0 or pi05"),
        (["metaworld_50_ppo_compact", "rollout.pipeline_stage_num=3"], "expected 1, or 2"),
        (["metaworld_50_ppo_compact", "runner.max_epochs=0"], "expected at least 1"),
        (["metaworld_50_grpo_compact", "algorithm.group_size=7"], "does not divide the 96 episodes"),
        (["metaworld_50_grpo_openpi", "env.train.dense_reward=true"], "bounds a reward of success"),
        (["ppo"], "give checkpoint=FOLDER"),
        (["quickstart", "data.path=nowhere"], "There is no dataset nowhere"),
        (["ppo", "checkpoint=nowhere"], "nowhere does not exist"),
        (["ppo", "checkpoint=compact-mt50", "data.path=nowhere"], "data.path would be without effect"),
        (["quickstart", "tasks=[hammer-v3]"], "env.eval.tasks: Task 'hammer-v3' is not in"),
        (["quickstart", "actor.global_batch_size=60"], "actor.global_batch_size=60 does not divide a rollout of"),
        (["quickstart", "learning_rate=-1"], "actor.optim.lr=-1.0; expected above 0"),
        (["quickstart", "seed=-1"], "actor.seed=-1; expected at least 0"),
        (["quickstart", "actor.model.num_action_chunks=0"], "actor.model.num_action_chunks=0; expected at least 1"),
        (["grpo", "checkpoint=compact-mt50", "num_envs=12"], "env.train.total_num_envs=12 for groups of"),
        (["grpo", "checkpoint=compact-mt50", "algorithm.group_size=0"], "algorithm.group_size=0; expected at least 1"),
        (["checkpoint=compact-mt50"], "checkpoint=compact-mt50 where a recipe is expected"),
        ([], "nothing where a recipe is expected"),
        (["metaworld_50_ppo_compact", "runner.logger.logger_backends=[tensorbord]"], "did you mean 'tensorboard'"),
        (["metaworld_50_ppo_compact", "runner.val_check_interval=0"], "expected at least 1, or -1"),
        (["metaworld_50_ppo_compact", "runner.val_check_interval=5", "env.eval.trials_per_task=0"], "has no trials"),
        (["metaworld_50_ppo_compact", "env.train.video_cfg.max_mb=0"], "video_cfg.max_mb=0.0; expected more than 0"),
        (["metaworld_50_ppo_compact", "env.train.video_interval=0"], "video_interval=0; expected at least 1"),
        (["--dry-run"], "nothing where a recipe is expected"),
    ],
)
def test_what_is_wrong_is_told_in_one_message(
    arguments: list[str],
    told: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", *arguments]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert error.startswith("error:") and told in error, error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("runner: [", "is not valid YAML"),
        ("- a\n", "expected a mapping"),
        ("runner: 3\n", "runner is a section"),
        ("base: other.yaml\n", "cannot read the configuration"),
        ("base: broken.yaml\n", "cannot build on itself"),
        ("base: [a]\n", "expected the name of a YAML file"),
        ("actor: {seed: many}\n", "actor.seed = 'many' does not fit, expected int"),
    ],
)
def test_a_broken_file_is_told_in_one_message(
    text: str, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.yaml").write_text(text)
    assert main(["train", str(tmp_path / "broken.yaml")]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_the_command_line_may_turn_off_what_the_recipe_says() -> None:
    """The recipe's bounds of rewards have no effect then; nobody could leave them out."""
    somewhere = "actor.model.model_path=somewhere"
    assert (
        plan_of("metaworld_50_grpo_openpi", [somewhere]).training
        != plan_of("metaworld_50_grpo_openpi", [somewhere, "algorithm.filter_rewards=false"]).training
    )
    with pytest.raises(ConfigError, match=r"^algorithm\.rewards_lower_bound would be without effect"):
        plan_of(
            "metaworld_50_grpo_openpi",
            [somewhere, "algorithm.filter_rewards=false", "algorithm.rewards_lower_bound=0.2"],
        )


def test_only_keys_of_the_own_file_and_the_command_line_must_be_used(tmp_path: Path) -> None:
    name = "metaworld_50_ppo_compact"
    (tmp_path / "mine.yaml").write_text(f"base: {name}.yaml\nsft: {{steps: 3}}\n")
    with pytest.raises(ConfigError, match=r"sft.steps would be without effect"):
        plan_of(str(tmp_path / "mine.yaml"), ["checkpoint=somewhere"])
    assert plan_of("quickstart", ["checkpoint=compact-mt50"]).sft is None
    # Imitation's settings stand in the file that the recipe builds on.
    assert plan_of(name, ["actor.model.model_path=somewhere"]).sft is None
    with pytest.raises(ConfigError, match=r"sft.steps would be without effect.*model_path=somewhere"):
        plan_of(name, ["actor.model.model_path=somewhere", "sft.steps=3"])


def test_sections_and_fields_are_explained() -> None:
    for key, _ in leaf_keys(Recipe):
        holder: Any = Recipe()
        *sections, name = key.split(".")
        for section in sections:
            holder = getattr(holder, section)
        assert any(f":param {name}:" in (kind.__doc__ or "") for kind in type(holder).__mro__), key
        assert dataclasses.is_dataclass(holder)


def test_find_recipe_takes_names_and_paths() -> None:
    assert find_recipe("metaworld_50_ppo_compact") == RECIPES / "metaworld_50_ppo_compact.yaml"
    assert find_recipe("some/where.yaml") == Path("some/where.yaml")


def test_a_dry_run_tells_the_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, of pi0 at full size: the backbone's 2.9 B weights in bfloat16, and in float32 weights, gradients and two
    moments of the expert's; a rollout of 64 x 8 x 20 decisions, each a picture of 224 x 224, four numbers of a state,
    64 bytes of a sentence, the time, the random step of five actions of 32 numbers from and to, which step that is, and
    28 bytes of rewards, values and the like."""
    name = "metaworld_50_ppo_openpi"
    found = footprint(plan_of(name, []))["ppo"]
    assert (
        2 * 2.9e9 < found.weights - found.gradients < 2 * 3.0e9 and 4 * 3.0e8 < found.gradients < 4 * 3.3e8
    )  # 311 M in the expert
    assert (found.optimizer, found.copies) == (2 * found.gradients, 0)
    assert found.buffer == 10_240 * (224 * 224 * 3 + 4 * 4 + 64 + 4 + 2 * 5 * 32 * 4 + 8 + 28)
    assert main(["train", name, "--dry-run"]) == 0
    assert f"Memory that ppo takes of each rank\n{found}\n" in capsys.readouterr().out


def test_the_memory_of_imitation_and_of_what_follows_it() -> None:
    stages = footprint(plan_of("metaworld_50_ppo_compact", []))
    assert list(stages) == ["sft", "ppo"]
    assert stages["sft"].buffer == 0 and stages["sft"].copies == stages["sft"].gradients  # averaged weights
    small = footprint(plan_of("metaworld_50_ppo_compact", ["data.image_size=48", "sft.batch_size=32"]))
    assert small["sft"].activations < 0.2 * stages["sft"].activations
    assert small["ppo"].buffer < stages["ppo"].buffer


def test_the_memory_of_each_stage_that_learns_is_told(unplayed: None) -> None:
    assert list(footprint(plan_of("metaworld_50_sft_compact", []))) == ["sft"]
    assert list(footprint(plan_of("metaworld_50_grpo_compact", ["actor.model.model_path=somewhere"]))) == ["grpo"]


def test_the_memory_of_a_new_model_counts_its_hand_view(unplayed: None) -> None:
    """Whether experts are recorded with it or it is cut from a dataset's pictures."""
    name, gradients = "metaworld_50_ppo_compact", []
    for given in ([], ["data.path=somewhere"], ["data.hand_view=null"]):
        stages = footprint(plan_of(name, given))
        hand = None if "data.hand_view=null" in given else {"size": 64}
        model = make_model("compact", {"action_horizon": 5, "image_size": 96, "hand_view": hand})
        assert stages["sft"].gradients == 4 * sum(weights.numel() for weights in model.parameters())
        gradients.append(stages["ppo"].gradients)
    assert gradients[0] == gradients[1] > gradients[2]


def test_a_dataset_s_hand_view_is_that_of_the_recipe() -> None:
    plan = plan_of("metaworld_50_sft_compact", ["data.path=somewhere", "data.hand_view=48"])
    assert plan.load is not None and plan.load["hand_view"] == HandView(48)
    for given in ([], ["data.path=somewhere", "data.hand_view=null"]):  # recorded with it; none
        plan = plan_of("metaworld_50_sft_compact", given)
        assert plan.load is not None and "hand_view" not in plan.load


def test_a_plan_of_a_checkpoint_is_of_its_published_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not of the size that trains from nothing, and with the adapters of imitation; here on a model of laptop size."""
    sizes: list[dict[str, Any]] = []
    models: list[VLAModel] = []

    def made(name: str, options: str) -> VLAModel:
        sizes.append(json.loads(options))
        return make_model(name, {})

    monkeypatch.setattr("sb3_vla.recipes.memory._made", made)
    monkeypatch.setattr("sb3_vla.recipes.memory.plan_memory", lambda model, **_: models.append(model))
    given = ["actor.model.model_path=somewhere", "actor.model.model_kwargs={base: true, action_horizon: 8}"]
    plan = plan_of("metaworld_50_sft_tinyvla", given)
    for options in (None, PUBLISHED_SIZES["TinyVLA-S"][1]):
        footprint(plan, options)
    assert [found["language"]["hidden_size"] for found in sizes] == [2048, 512]
    assert all(found["action_horizon"] == 8 and "base" not in found for found in sizes)
    assert all(adapted_layers(model) for model in models)


def test_the_size_of_diffusion_policy_is_that_of_its_recipe() -> None:
    plan = plan_of("metaworld_50_sft_diffusion_policy", [])
    assert plan.load is not None
    made = {"image_size": plan.load["image_size"], **plan.model_kwargs}
    assert json.loads(json.dumps(published_options("diffusion_policy"))) == made


@pytest.mark.parametrize(
    ("recipe", "save", "model", "options"),
    [
        ("tinyvla_laptop", save_checkpoint, "tinyvla", {"image_size": 48}),
        ("tinyvla", save_tinyvla, "tinyvla", {}),
        ("diffusion_policy", save_diffusion_policy, "diffusion_policy", {}),
        ("smolvla", save_smolvla, "smolvla", {"vlm": "laptop", "layers": 2, "image_size": 96}),
        ("openvlaoft", save_openvla_oft, "openvla_oft", {"sizes": "laptop", "resolution": 56, "image_size": 96}),
        ("openpi_pi05", save_openpi, "pi05", TINY_PI0),
    ],
)
def test_a_plan_of_a_folder_is_of_the_size_that_it_tells(
    unplayed: None,
    recipe: str,
    save: Callable[..., None],
    model: str,
    options: dict[str, Any],
    tmp_path: Path,
    recwarn: Any,
) -> None:
    small = {**options, "tokenizer": str(tiny_tokenizer(tmp_path))} if model == "pi05" else options
    made = make_model(model, small)
    save(tmp_path / "model", made)
    plan = plan_of(f"metaworld_50_ppo_{recipe}", [f"actor.model.model_path={tmp_path / 'model'}"])
    found = footprint(plan)["ppo"]
    assert f"of {sum(p.numel() for p in made.parameters()):,} parameters" in found.settings
    with torch.device("meta"):
        alike = make_model(model, made.config)
    assert plan.training is not None
    assert found == plan_training(alike, plan.training, action_chunk=plan.action_chunk)
    assert not [warning for warning in recwarn if "no-op" in str(warning.message)]


def test_a_plan_of_a_folder_that_is_yet_to_come_is_of_the_size_of_the_recipe(unplayed: None) -> None:
    name = "metaworld_50_ppo_{}_laptop"
    for model in ("tinyvla", "smolvla"):
        begun = footprint(plan_of(name.format(model), []))["ppo"]
        going_on = footprint(plan_of(name.format(model), ["actor.model.model_path=runs/nowhere"]))["ppo"]
        assert going_on.settings == begun.settings and going_on.optimizer == begun.optimizer
    read = ["actor.model.model_path=somewhere", "actor.model.model_kwargs={unnorm_key: meta_world_strict}"]
    assert "of 7,651," in footprint(plan_of("metaworld_50_grpo_openvlaoft_lora", read))["grpo"].settings


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_memory_of_every_recipe_is_planned() -> None:
    for name in NAMES:
        start = [start_of(name)] if name in ("ppo", "grpo") else []
        stages = footprint(plan_of(name, start)).values()
        assert all(stage.device > stage.weights > 0 for stage in stages), name


def test_the_memory_of_a_checkpoint_of_the_package_is_its_own(unplayed: None) -> None:
    plan = make_plan(load_recipe("metaworld_50_ppo_compact", ["actor.model.model_path=compact-mt50"]))
    assert "of 2,266,308 parameters" in str(footprint(plan)["ppo"])
