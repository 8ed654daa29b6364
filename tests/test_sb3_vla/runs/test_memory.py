"""The memory planner, against what a real update allocates."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from published import same_tensors
from stable_baselines3.common.vec_env import DummyVecEnv
from test_openvla_oft import TINY as TINY_OFT
from test_training import Captured
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from toy import TINY, ToyEnv, toy_observation, toy_vec
from toy_pi0 import TINY_PI0, tiny_tokenizer
from trainings import grpo, ppo

from sb3_vla import GRPO, PPO, HoldAtEnd
from sb3_vla.checkpoints import load_checkpoint, save_checkpoint
from sb3_vla.cli.main import main
from sb3_vla.distributions import make_distribution
from sb3_vla.distributions.flow_sde import FlowSDE
from sb3_vla.models import VLAModel, make_model
from sb3_vla.models.recomputing import Recomputing
from sb3_vla.recipes.memory import footprint
from sb3_vla.recipes.resolve import make_plan
from sb3_vla.recipes.schema import load_recipe
from sb3_vla.runs import training
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.memory_plan import _SENTENCE, GIB, HEADROOM, MemoryPlan, plan_memory
from sb3_vla.runs.settings import Training
from sb3_vla.runs.training import plan_training, train

#: large enough that activations are far more than what is allocated beside them
SMALL: dict[str, Any] = {
    **TINY_PI0,
    "vlm": {"width": 64, "mlp": 256, "depth": 3, "head_dim": 16},
    "expert": {"width": 64, "mlp": 256, "depth": 3, "head_dim": 16},
}


def measured(model: VLAModel, batch: int, draws: int = 1) -> int:
    """Bytes that an update's forward and backward pass hold at their worst moment, by torch's profiler."""
    side = model.image_size[0]
    observation = toy_observation(batch, _SENTENCE, image_size=side)
    actions = torch.zeros(batch, model.action_horizon, model.action_dim)
    mask = torch.ones(batch, model.action_horizon, dtype=torch.bool)

    def forget(parameter: Tensor) -> None:
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(forget) for p in model.parameters() if p.requires_grad]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        model.imitation_loss(observation, actions, mask, draws=draws).backward()
    for hook in hooks:
        hook.remove()
    events = sorted(
        (e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("trainable", ["expert", "all"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_of_a_real_update(tmp_path: Path, trainable: str, checkpointing: bool) -> None:
    model = make_model("pi0", {**SMALL, "tokenizer": str(tiny_tokenizer(tmp_path)), "prompt_tokens": 15})
    plan = plan_memory(model, trainable=trainable, batch_size=16, gradient_checkpointing=checkpointing)
    model.set_trainable(trainable)
    model.set_gradient_checkpointing(checkpointing)
    measured(model, 2)  # what is allocated once
    assert plan.activations == pytest.approx(measured(model, 16), rel=0.1)


LAPTOP_OFT = {"sizes": "laptop", "resolution": 56, "image_size": 96, "max_prompt_tokens": 108}


@pytest.mark.parametrize(("name", "options"), [("tinyvla", {}), ("openvla_oft", LAPTOP_OFT)])
def test_recomputed_layers_give_the_same_gradients(name: str, options: dict[str, Any]) -> None:
    model, given = make_model(name, options), toy_observation(2, image_size=options.get("image_size", 64))
    actions, mask = torch.rand(2, model.action_horizon, 4), torch.ones(2, model.action_horizon, dtype=torch.bool)
    gradients = []
    for recomputed in (False, True):
        model.zero_grad()
        model.set_gradient_checkpointing(recomputed)
        torch.manual_seed(0)
        model.imitation_loss(given, actions, mask).backward()
        gradients.append({name: value.grad for name, value in model.named_parameters() if value.grad is not None})
    assert same_tensors(*gradients)
    model.set_gradient_checkpointing(False)
    plans = [plan_memory(model, trainable="all", batch_size=8, gradient_checkpointing=on) for on in (False, True)]
    assert plans[1].activations < 0.7 * plans[0].activations


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("compact", {"image_size": 64}),
        ("diffusion_policy", {}),
        ("smolvla", {"vlm": "laptop", "layers": 2, "image_size": 96, "action_horizon": 8}),
        ("tinyvla", {}),
        ("openvla_oft", LAPTOP_OFT),
    ],
)
def test_other_models(name: str, options: dict[str, Any]) -> None:
    model = make_model(name, options)
    plan = plan_memory(model, trainable="all", batch_size=8)
    model.set_trainable("all")
    measured(model, 2)
    assert plan.activations == pytest.approx(measured(model, 8), rel=0.25)


@pytest.mark.parametrize("name", ["tinyvla", "diffusion_policy"])
def test_the_copy_that_takes_the_first_steps_is_planned(name: str) -> None:
    def planned(**options: Any) -> MemoryPlan:
        config = ppo(
            batch_size=8,
            n_steps=4,
            num_envs=4,
            device="cpu",
            distribution="ddim",
            distribution_kwargs={"denoising_steps": 5, **options},
        )
        return plan_training(make_model(name, {}), config, action_chunk=5)

    model = make_model(name, {})
    model.set_trainable("expert")
    held = make_distribution("ddim", model, 5, trained_steps=3).state_dict().values()
    plan, whole, single = planned(trained_steps=3), planned(), planned(joint=False)
    assert whole.copies == single.copies == 0
    assert plan.copies == pytest.approx(sum(tensor.numel() * 4 for tensor in held), rel=1e-2)
    assert plan.device - plan.copies - plan.activations == whole.device - whole.activations
    # An update takes the gradient of each trained step, which is random, or of the one that is.
    for steps, found in ((3, plan), (5, whole), (1, single)):
        measured(model, 2, steps)
        assert found.activations == pytest.approx(measured(model, 8, steps), rel=0.25), steps
    assert single.activations < whole.activations


def test_what_does_not_depend_on_the_batch() -> None:
    model = make_model("pi05", TINY_PI0)
    trained = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("paligemma_with_expert.pal"))
    total = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    options: dict[str, Any] = {"trainable": "expert", "batch_size": 2, "num_envs": 3, "decisions": 7, "copies": 1}
    options["distribution"] = FlowSDE(5, joint=True, denoising_steps=5)
    plan = plan_memory(model, **options)
    assert plan.weights == 4 * total + buffers
    assert (plan.gradients, plan.optimizer, plan.copies) == (4 * trained, 8 * trained, 4 * trained)
    chain = 5 * 32 * 4 * 6  # five actions of 32 numbers at the six stages of five denoising steps
    assert plan.buffer == 3 * 7 * (3 * 56 * 56 + 4 * 4 + 64 + chain)  # picture, state, instruction
    tokens = 16 + 200  # of the picture and of the longest prompt
    prefix = tokens * 3 * 2 * 16 * 4 + tokens + 2 * 64 * 4  # keys and values, which are valid, summary
    assert plan.prefix_per_decision == prefix
    assert plan_memory(model, **options, cache_perception=True).buffer == 3 * 7 * (prefix + chain)
    spread = plan_memory(model, **options, world_size=2)
    assert spread.optimizer == pytest.approx(plan.optimizer / 2, abs=8)
    # Between updates the weights are whole on each rank, beside its half of them; in one they are given back, but for
    # those that are in no block, one block, and the next.
    assert spread.weights == pytest.approx(plan.weights + 2 * trained, abs=8)
    model.set_trainable("expert")
    blocks = [sum(4 * p.numel() for p in b.parameters() if p.requires_grad) for b in model.sharding_units()]
    gathered = 4 * trained - sum(blocks) + 2 * max(blocks)
    assert spread.released == 4 * trained - gathered and plan.released == 0
    assert spread.gradients == pytest.approx(2 * trained + gathered, abs=8)


def test_a_plan_needs_neither_weights_nor_a_tokenizer_and_leaves_the_model_alone() -> None:
    with torch.device("meta"):
        model = make_model("pi0", {**SMALL, "tokenizer": "/nowhere"})
    model.set_trainable("all")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    tokenize = model.tokenize
    plans = [plan_memory(model, trainable="expert", batch_size=batch, gradient_checkpointing=True) for batch in (4, 8)]
    assert plans[1].activations == pytest.approx(2 * plans[0].activations, rel=0.1)
    assert model.tokenize is tokenize and not model.gradient_checkpointing
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    assert all(p.is_meta for p in model.parameters())


def counted(forward: Callable[..., Any], ran: list[None]) -> Callable[..., Any]:
    """A layer's forward pass, which leaves a mark."""

    def call(*args: Any, **kwargs: Any) -> Any:
        ran.append(None)
        return forward(*args, **kwargs)

    return call


ALIKE = [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"trainable": "all"}]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *(("pi0", options) for options in ALIKE),  # how it is trained, and below which layers there are
        ("pi05", {}),
        ("openvla_oft", {}),
        *(pytest.param(name, each, marks=pytest.mark.slow) for name in ("pi05", "openvla_oft") for each in ALIKE[1:]),
    ],
)
def test_one_of_the_frozen_layers_stands_for_all(
    name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"sizes": "laptop", "resolution": 56, "image_size": 96, "max_prompt_tokens": 108}
    with torch.device("meta"):
        model = make_model(name, sizes if name == "openvla_oft" else SMALL)
    planned = {"trainable": "expert", "batch_size": 8, "num_envs": 3, "decisions": 5, **options}
    kinds = {type(module) for module in model.modules() if isinstance(module, Recomputing)}
    plans: list[MemoryPlan] = []
    passes: list[int] = []
    ran: list[None] = []
    for kind in kinds:
        monkeypatch.setattr(kind, "forward", counted(kind.forward, ran))
    for stand_in in (None, lambda *_: nullcontext()):
        ran.clear()
        monkeypatch.setattr("sb3_vla.runs.memory_plan._PLAYED", {})
        if stand_in is not None:
            monkeypatch.setattr("sb3_vla.runs.memory_plan._one_of_alike", stand_in)
        plans.append(plan_memory(model, **planned))
        passes.append(len(ran))
    assert plans[0] == plans[1]
    assert passes[0] < passes[1] or (planned["trainable"] == "all" and passes[0] == passes[1])


def resident(what: str) -> int:
    """Bytes of this process: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads what Linux tells of a process")
@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        ("metaworld_50_ppo_openpi", "3,238,048,528"),
        pytest.param("metaworld_50_ppo_openpi_pi05", "3,353,433,872", marks=pytest.mark.slow),
    ],
)
def test_a_recipe_at_full_size_is_planned_in_seconds_without_its_weights(
    recipe: str, parameters: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three to four seconds of a slow core; what takes longer is importing torch and transformers, done before."""
    make_model("pi0", TINY_PI0)
    monkeypatch.setattr("sb3_vla.runs.memory_plan._PLAYED", {})
    Path("/proc/self/clear_refs").write_text("5")  # the largest memory is looked for anew
    before, started = resident("VmRSS"), time.process_time()
    assert main(["train", recipe, "--dry-run"]) == 0
    assert time.process_time() - started < 20
    assert resident("VmHWM") - before < GIB // 2
    assert f"of {parameters} parameters" in capsys.readouterr().out


def test_each_saving_saves() -> None:
    with torch.device("meta"):
        model = make_model("pi0", SMALL)
    full = plan_memory(model, trainable="all", batch_size=16)
    recomputed = plan_memory(model, trainable="all", batch_size=16, gradient_checkpointing=True)
    expert = plan_memory(model, trainable="expert", batch_size=16)
    joint = plan_memory(model, trainable="expert", batch_size=16, denoisings=5)
    halved = plan_memory(model, trainable="all", batch_size=16, bf16=True)
    assert recomputed.activations < 0.6 * full.activations and halved.activations < 0.9 * full.activations
    assert expert.activations < full.activations and expert.device < full.device
    assert joint.activations > expert.activations


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_training_the_expert_at_full_size_fits_one_gpu(name: str) -> None:
    """RLinf's micro batch of 128, on a GPU of 80 GB; everything in float32 does not."""
    with torch.device("meta"):
        model = make_model(name, {"prompt_tokens": 48})
    expert: dict[str, Any] = {"trainable": "expert", "batch_size": 128, "num_envs": 64}
    everything = plan_memory(model, trainable="all", batch_size=128, num_envs=64)
    with pytest.raises(ValueError, match="on the device"):
        everything.check(80 * 10**9)
    model.set_trainable("expert")
    model.halve_backbone()
    plan_memory(model, **expert, bf16=True).check(80 * 10**9)


def plan(**sizes: int) -> MemoryPlan:
    names = ("weights", "copies", "gradients", "optimizer", "activations", "rollout", "prefix_per_decision", "buffer")
    return MemoryPlan(**{**dict.fromkeys(names, 0), **{k: v * GIB for k, v in sizes.items()}}, settings="Pi0")


def test_the_table() -> None:
    sizes = plan(weights=12, gradients=2, optimizer=4, activations=8, rollout=9, buffer=3)
    assert sizes.device == (12 + 4 + 10) * GIB
    lines = str(sizes).splitlines()
    assert lines[0] == "Pi0" and f"{'device, at most':<32}{26:>10.3f} GiB" in lines
    sizes.check(int(26 * GIB / (1 - HEADROOM)) + 2, 3 * GIB)


@pytest.mark.parametrize(
    ("sizes", "advice"),
    [
        ({"weights": 4, "activations": 10}, "Lower micro_batch_size, set gradient_checkpointing=True, or bf16=True"),
        ({"weights": 4, "gradients": 4, "optimizer": 8}, r'trainable="expert".*trainable="lora".*more ranks'),
        ({"weights": 12}, "frozen_bf16=True"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(sizes: dict[str, int], advice: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)9\.0 GiB of its 10\.0 GiB.*{advice}.*Pi0"):
        plan(**sizes).check(10 * GIB)


def test_a_training_that_does_not_fit_is_refused_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path / "model", make_model("pi0", {**TINY_PI0, "tokenizer": str(tiny_tokenizer(tmp_path))}))
    monkeypatch.setattr("sb3_vla.runs.training.get_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (2**20, 2**20))
    config = ppo(iterations=1, n_steps=2, num_envs=2, horizon=10, batch_size=4)
    run = RunDirectory(tmp_path / "run", {})
    options: dict[str, Any] = {"suite": "MT1", "tasks": ["reach-v3"], "progress": False}
    with pytest.raises(ValueError, match=r"This training needs .* GiB on the device"):
        train(run, "ppo", config, checkpoint=tmp_path / "model", output=tmp_path / "ppo", **options)
    assert not (tmp_path / "ppo").exists()


def test_ranks_of_a_machine_have_its_memory_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has a rollout of its own: what is free for one of them is too little for four."""
    save_checkpoint(tmp_path / "model", make_model("compact", {"action_horizon": 5, **TINY}))
    config = ppo(iterations=1, n_steps=2, num_envs=2, horizon=10, batch_size=4)
    planned = plan_training(load_checkpoint(tmp_path / "model", weights=False).model, config)
    monkeypatch.setattr("sb3_vla.runs.training.get_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (2**40, 2**40))
    monkeypatch.setattr("sb3_vla.runs.training.available_memory", lambda: 2 * (planned.buffer + planned.compared))
    monkeypatch.setattr("sb3_vla.runs.training.ranks_on_this_machine", lambda: 4)
    run = RunDirectory(tmp_path / "run", {})
    with pytest.raises(ValueError, match="The rollout buffer needs"):
        train(run, "ppo", config, checkpoint=tmp_path / "model", output=tmp_path / "ppo", suite="MT10", progress=False)


def test_a_buffer_beyond_main_memory_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rollout buffer needs 20\.0 GiB of main memory; 10\.0 GiB"):
        plan(buffer=20).check(10 * GIB, 10 * GIB)


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_a_plan_for_a_gpu_does_not_depend_on_the_processor(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """precision=auto is bfloat16 on any GPU, and on a processor what it computes faster."""
    given = ["actor.model.precision=auto", *(["actor.model.model_path=somewhere"] if stage == "ppo" else [])]
    name = f"metaworld_50_{stage}_compact"

    def planned(device: str, supported: bool) -> MemoryPlan:
        monkeypatch.setattr("sb3_vla.common.precision.bf16_supported", lambda: supported)
        plan = make_plan(load_recipe(name, given))
        if plan.sft is not None:
            plan.sft.device = device
        if plan.training is not None:
            plan.training.arguments["device"] = device
        return footprint(plan)[stage]

    assert planned("auto", False) == planned("cuda", True) and "bf16=True" in planned("auto", False).settings
    with_it, without = planned("cpu", True), planned("cpu", False)
    assert "bf16=False" in without.settings and with_it == planned("auto", True)
    assert with_it.activations < without.activations


def test_numbers_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="batch_size=0; expected at least 1"):
        plan_memory(make_model("pi0", TINY_PI0), batch_size=0)


def held(tensors: Iterable[Tensor]) -> int:
    """Bytes of tensors, each memory counted once."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


TRAININGS: dict[str, tuple[str, dict[str, Any], partial[Training]]] = {
    "gaussian": ("compact", TINY, partial(ppo, trainable="all", kl_coef=0.1)),
    "learned deviation, frozen backbone": (
        "compact",
        TINY,
        partial(ppo, kl_coef=0.1, distribution_kwargs={"std": 0.2, "learn_std": True}, cache_perception=False),
    ),
    "kept perception, one random step": (
        "compact",
        TINY,
        partial(
            ppo, distribution="flow_sde", distribution_kwargs={"denoising_steps": 6}, env={"privileged_state": False}
        ),
    ),
    "learned noise": (
        "compact",
        TINY,
        partial(ppo, trainable="all", distribution="flow_noise", distribution_kwargs={}),
    ),
    "steps that stay": (
        "diffusion_policy",
        {"image_size": 64, "crop_size": 56, "down_dims": (16, 32), "step_dim": 16, "action_horizon": 8},
        partial(ppo, distribution="ddim", distribution_kwargs={"denoising_steps": 4, "trained_steps": 2}),
    ),
    "tokens": (
        "openvla_oft",
        {**TINY_OFT, "image_size": 32, "action_horizon": 5},
        partial(ppo, trainable="all", distribution="tokens", distribution_kwargs={}),
    ),
    "groups": (
        "compact",
        TINY,
        partial(
            grpo,
            trainable="all",
            group_size=4,
            distribution="flow_cps",
            distribution_kwargs={"joint": True},
            kl_coef=0.1,
        ),
    ),
    "groups in turns": ("compact", TINY, partial(grpo, group_size=8, cache_perception=False)),
}


@pytest.mark.parametrize("case", TRAININGS)
def test_a_plan_is_what_a_training_holds(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what is gone after an update, within a tenth of what tensors take."""
    name, options, make = TRAININGS[case]
    grouped = make.func is grpo
    shared: dict[str, Any] = {"num_envs": 4, "horizon": 15, "batch_size": 12, "n_epochs": 1, "actor_warmup": 0}
    own_sizes = {"total_decisions": 1, "n_groups": 3} if grouped else {"n_steps": 6, "critic_warmup": 0}
    config = make(device="cpu", **shared, **own_sizes)
    save_checkpoint(tmp_path / "start", make_model(name, {"action_horizon": 5, **options}))
    start = load_checkpoint(tmp_path / "start", weights=False).model
    plan = plan_training(start, config, action_chunk=5)

    privileged = config.env.get("privileged_state", True)
    env: dict[str, Any] = {"chunk": 5, "action_dim": 4, "horizon": 3, "privileged": privileged}
    env["image_size"] = start.image_size[0]

    def environments(makers: list[Any], num_workers: int | None) -> DummyVecEnv:
        return DummyVecEnv([lambda: HoldAtEnd(ToyEnv(**env))] * len(makers)) if grouped else toy_vec(4, **env)

    def learn(algorithm: PPO, decisions: int, callback: Any, reset_num_timesteps: bool) -> None:
        algorithms.append(algorithm)
        for layer in algorithm.policy.modules():
            if isinstance(layer, torch.nn.Linear):  # so that episodes end otherwise
                torch.nn.init.normal_(layer.weight, std=0.05)
        compare = algorithm._behavior_policy

        def comparing(*arguments: Any, **options: Any) -> Any:
            compared.append(compare(*arguments, **options))
            return compared[-1]

        algorithm._behavior_policy = comparing  # type: ignore[method-assign]
        real(algorithm, 1, log_interval=1000)
        raise Captured

    algorithms: list[Any] = []
    compared: list[Any] = []
    real = PPO.learn
    monkeypatch.setattr(training, "SharedMemoryVecEnv", environments)
    monkeypatch.setattr(PPO, "learn", learn)
    monkeypatch.setattr(GRPO, "learn", learn)
    run = RunDirectory(tmp_path / "run", {})
    with pytest.raises(Captured):
        train(run, "rl", config, checkpoint=tmp_path / "start", output=tmp_path / "rl", suite="MT10", progress=False)

    (trained,) = algorithms
    policy, buffer = trained.policy, trained.rollout_buffer
    own = [*policy.model.parameters(), *policy.model.buffers(), *policy.value_head.parameters()]
    acting = [*policy.distribution.parameters(), *policy.distribution.buffers()]
    learned = [tensor for tensor in (*own, *acting) if tensor.requires_grad]
    everything = held([*own, *acting, *(trained._reference.parameters() if trained._reference else ())])
    weights = held([*own, *learned])
    assert plan.weights == pytest.approx(weights, rel=0.1)
    assert plan.copies == pytest.approx(everything - weights, rel=0.1, abs=64)
    assert (plan.copies > 64) == ("kl_coef" in config.arguments or case == "steps that stay")
    assert plan.gradients == pytest.approx(held(learned), rel=0.1)
    moments = [value for state in policy.optimizer.state.values() for value in state.values()]
    assert plan.optimizer == pytest.approx(held(moments), rel=0.1)
    stored: list[Tensor] = []
    if not config.algorithm.has_critic:
        assert len(buffer) == 3 * config.arguments["group_size"] * 3  # all groups were kept
        stored = [t for e, step in buffer._places for part in e.decision(step) for t in part.values()]
    else:
        stored = [*buffer.observations.values(), *buffer.traces.values()]
        stored += [value for value in vars(buffer).values() if isinstance(value, Tensor)]
    assert plan.buffer == pytest.approx(held(stored), rel=0.1)
    (old,) = compared
    numbers = [getattr(each, name) for each in (old, old.reference) if each for name in ("log_prob", "mean", "std")]
    assert plan.compared == pytest.approx(held(numbers), rel=0.1)
