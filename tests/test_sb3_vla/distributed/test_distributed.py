"""Ranks under torchrun do what one process would do, decide together, and do not wait for the dead."""

from __future__ import annotations

import functools
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocated import Allocated
from ranks import run_ranks
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.vec_env import DummyVecEnv
from test_evaluation import EASY, EXPERT_PROTOCOL, ExpertPolicy, expert_env
from test_grpo import toy_grpo
from toy import TINY, ToyEnv, tiny_model, toy_demonstrations, toy_ppo, toy_vec
from trainings import ppo

from sb3_vla import PPO, HoldAtEnd
from sb3_vla.common.errors import RankLostError
from sb3_vla.data.batches import DemonstrationBatches
from sb3_vla.distributed import ranks as distributed
from sb3_vla.distributed.fsdp import whole_optimizer_state
from sb3_vla.distributed.ranks import Ranks, current_ranks, ranks_on_this_machine, torchrun
from sb3_vla.evaluation.evaluation import evaluate
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.memory_plan import MemoryPlan, plan_memory
from sb3_vla.runs.resume import load_algorithm, save_algorithm
from sb3_vla.runs.training import train
from sb3_vla.sft.imitation import sft
from sb3_vla.sft.settings import SFTConfig

#: gradients summed in another order differ by a few units in the last place, and so do weights after steps of SGD
ROUNDING = 2e-6
SGD: dict[str, Any] = {"optimizer_class": torch.optim.SGD}


# --- What ranks tell one another --------------------------------------------------------------------------------------


def test_alone_nothing_is_sent() -> None:
    ranks = current_ranks()
    assert ranks == Ranks(0, 1) and ranks.leads
    assert ranks.gather("x") == ["x"] and ranks.from_first(3) == 3 and ranks.total(5) == 5 and not ranks.any(False)
    with torchrun() as found:
        assert found == ranks and not torch.distributed.is_initialized()


def test_shares() -> None:
    assert [list(Ranks(rank, 3).share(6, "num_envs")) for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert [Ranks(rank, 3).rows(7, "trials").tolist() for rank in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]
    with pytest.raises(ValueError, match="num_envs=7 cannot be shared by 2 ranks; expected a multiple of 2, such as 8"):
        Ranks(0, 2).share(7, "num_envs")
    with pytest.raises(ValueError, match="2 trials for 3 ranks; expected at least one for each"):
        Ranks(0, 3).rows(2, "trials")


def _tell(rank: int) -> dict[str, Any]:
    ranks = current_ranks()
    torch.manual_seed(rank)
    ranks.take_generators(first=1)

    def fail() -> None:
        raise FileNotFoundError("no such run")

    with pytest.raises(FileNotFoundError, match="no such run"):
        ranks.first_does(fail)
    return {
        "ranks": (ranks.rank, ranks.count, ranks.leads),
        "gathered": ranks.gather(10 * rank),
        "from the first": ranks.from_first(f"of {rank}"),
        "done by the first": ranks.first_does(os.getpid),
        "pid": os.getpid(),
        "any": (ranks.any(rank == 1), ranks.any(False)),
        "total": ranks.total(rank + 1),
        "drawn": torch.rand(2).tolist(),
    }


def test_what_ranks_tell_one_another() -> None:
    first, second = run_ranks(2, _tell)
    assert first["ranks"] == (0, 2, True) and second["ranks"] == (1, 2, False)
    assert first["gathered"] == second["gathered"] == [0, 10]
    assert first["from the first"] == second["from the first"] == "of 0"
    assert first["done by the first"] == second["done by the first"] == first["pid"] != second["pid"]
    assert first["any"] == second["any"] == (True, False) and first["total"] == second["total"] == 3
    torch.manual_seed(1)
    assert first["drawn"] == second["drawn"] == torch.rand(2).tolist()


def _gradients(rank: int) -> list[torch.nn.Parameter]:
    """Of seven parameters, of two types; some that one rank has no gradient of, and one that none has."""
    parameters = [torch.nn.Parameter(torch.zeros(size, dtype=torch.float32)) for size in (3, 40, 1, 5)]
    parameters += [torch.nn.Parameter(torch.zeros(2, 3, dtype=torch.float64)) for _ in range(3)]
    generator = torch.Generator().manual_seed(rank)
    for number, parameter in enumerate(parameters):
        drawn = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        if number != 6 and not (number == 1 and rank == 0) and not (number == 4 and rank == 1):
            parameter.grad = drawn
    return parameters


def test_gradients_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_BUCKET_NUMBERS", 8)  # several buckets, and a parameter that is larger than one

    def work(rank: int) -> Any:
        parameters = _gradients(rank)
        beside = {"loss": 1.5 * (rank + 1)} | ({"only here": 2.0} if rank else {})
        sums = current_ranks().sum_gradients(parameters, beside)
        return sums, [None if p.grad is None else p.grad.tolist() for p in parameters]

    (sums, found), again = run_ranks(2, work)
    assert (sums, found) == again and sums == {"loss": 4.5, "only here": 2.0}
    parts = [[p.grad for p in _gradients(rank)] for rank in range(2)]
    for gradient, first, second in zip(found, *parts, strict=True):
        present = [part for part in (first, second) if part is not None]
        assert gradient == (sum(present[1:], present[0]).tolist() if present else None)


def test_other_weights_are_refused() -> None:
    def work(rank: int) -> str:
        weights = {"a": torch.zeros(3), "b": torch.tensor([1.0, 2.0] if rank else [2.0, 1.0])}
        with pytest.raises(ValueError, match=r"The weights of the policy on rank . are not those on rank .") as caught:
            current_ranks().check_same(weights, "the policy")
        current_ranks().check_same({"a": torch.ones(3)}, "the policy")
        return str(caught.value)

    assert all("(b); give all ranks the same checkpoint" in message for message in run_ranks(2, work))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool])
def test_weights_are_compared_bit_by_bit(dtype: torch.dtype) -> None:
    """Also those that are not finite, that lie in memory in another order, and that two places exchanged."""

    def work(rank: int) -> list[bool]:
        rows = (torch.rand(600, 1000, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
        exchanged = rows.clone()
        exchanged[1, 2], exchanged[500, 3] = 0, 1
        if rank:
            exchanged[1, 2], exchanged[500, 3] = 1, 0
        turned = rows.T.contiguous().T if rank else rows
        missing = torch.full((3,), torch.nan) if dtype.is_floating_point else torch.zeros(0)
        found = []
        for weights in ({"a": rows}, {"a": turned}, {"a": missing.to(dtype)}, {"a": exchanged}):
            try:
                current_ranks().check_same(weights, "the policy")
                found.append(True)
            except ValueError:
                found.append(False)
        return found

    assert run_ranks(2, work) == [[True, True, True, False]] * 2


@pytest.mark.parametrize("transposed", [False, True])
def test_comparing_weights_takes_little_memory(transposed: bool) -> None:
    def work(_: int) -> int:
        weights = torch.ones(4, 2**20)  # 16 MiB
        with Allocated() as memory:
            current_ranks().check_same({"a": weights.T if transposed else weights}, "the policy")
        return memory.most

    assert max(run_ranks(2, work)) < 8 * 2**20


def test_a_rank_that_ends_does_not_let_others_wait() -> None:
    def work(rank: int) -> tuple[str, float]:
        if rank == 1:
            return "", 0.0
        time.sleep(0.5)
        started = time.perf_counter()
        with pytest.raises(RankLostError) as caught:
            current_ranks().gather(1)
        return str(caught.value), time.perf_counter() - started

    message, seconds = run_ranks(2, work)[0]
    assert message.startswith("Rank 0 gives up: another rank has ended, or did not answer in time (")
    assert message.endswith("the same command goes on from the last checkpoint") and seconds < 5


def test_a_rank_that_does_not_answer_is_given_up() -> None:
    def work(rank: int) -> float:
        if rank == 1:
            time.sleep(4)
            return 0.0
        started = time.perf_counter()
        with pytest.raises(RankLostError):
            current_ranks().gather(1)
        return time.perf_counter() - started

    assert 0.5 < run_ranks(2, work, timeout_seconds=1.0, patience_seconds=30.0)[0] < 3.5


# --- What they learn --------------------------------------------------------------------------------------------------


class VariedEnv(ToyEnv):
    """Episodes whose length the seed decides."""

    def reset(self, **options: Any) -> Any:
        found = super().reset(**options)
        self.horizon = 1 + int(self.np_random.integers(5))
        return found


def _ppo(ranks: int, env_kwargs: dict[str, Any], options: dict[str, Any]) -> PPO:
    env = toy_vec(4 // ranks, **{"horizon": 3, "truncates": True, "privileged": True, **env_kwargs})
    algorithm = toy_ppo(env, **options)
    algorithm.policy.optimizer = torch.optim.SGD(
        [{"params": group["params"]} for group in algorithm.policy.optimizer.param_groups], lr=algorithm.learning_rate
    )
    return algorithm


def _grpo(ranks: int, env_kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
    makers: list[Any] = [lambda: HoldAtEnd(VariedEnv(**env_kwargs))] * (8 // ranks)
    algorithm = toy_grpo(DummyVecEnv(makers), group_size=2, n_groups=7, n_epochs=2, **options)
    algorithm.policy.optimizer = torch.optim.SGD(
        [{"params": group["params"]} for group in algorithm.policy.optimizer.param_groups], lr=algorithm.learning_rate
    )
    return algorithm


def result_of(algorithm: PPO) -> dict[str, Any]:
    """What a training leaves: weights, counters, what it remembers of episodes, and metrics that are no times."""
    known = algorithm.logger.name_to_value.items()
    return {
        "weights": {name: p.detach().numpy().copy() for name, p in algorithm.policy.named_parameters()},
        "counters": (algorithm.num_timesteps, algorithm.env_steps, algorithm.updates, algorithm._n_updates),
        "episodes": {task: list(episodes) for task, episodes in algorithm.episodes.by_task.items()},
        "successes": list(algorithm.ep_success_buffer or ()),
        "metrics": {name: value for name, value in known if not name.startswith(("time/", "perf/"))},
        "generator": torch.get_rng_state().numpy(),
    }


def assert_alike(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    for name, weights in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weights, rtol=tolerance, atol=tolerance, err_msg=name)
    for name in ("counters", "episodes", "successes"):
        assert found[name] == expected[name], name
    assert np.array_equal(found["generator"], expected["generator"])
    assert found["metrics"].keys() == expected["metrics"].keys()
    for name, value in expected["metrics"].items():
        assert found["metrics"][name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def trained(make: Callable[..., PPO], ranks: int, decisions: int, *arguments: Any) -> dict[str, Any]:
    algorithm = make(ranks, *arguments)
    algorithm.learn(decisions, log_interval=1000)
    return result_of(algorithm)


PPO_SETTINGS: dict[str, dict[str, Any]] = {
    "default": {"n_epochs": 2},
    "flow, micro-batches, KL": {
        "distribution": "flow_sde",
        "micro_batch_size": 3,
        "kl_coef": 0.1,
        "task_sampling": "signal",
        "gamma_per": "env_step",
        "clip_range_vf": 0.01,
        "critic_warmup": 1,
    },
    "tokens, joint stop": {
        "distribution": "tokens",
        "model": "toy_tokens",
        "model_kwargs": {},
        "ent_coef": 0.01,
        "n_epochs": 3,
        "target_kl": 1e-5,
        "learning_rate": 0.05,
        "logprob_type": "token",
    },
}


@pytest.mark.parametrize("settings", PPO_SETTINGS)
def test_ranks_learn_by_ppo_what_one_process_learns(settings: str, toy_models: None) -> None:
    options = PPO_SETTINGS[settings]
    expected = trained(_ppo, 1, 4 * 8 * 3, {}, options)
    if "target_kl" in options:
        assert expected["counters"][3] < 9  # it stopped, so that stopping is compared
    for ranks in (2, 4):
        results = run_ranks(ranks, lambda _, ranks=ranks: trained(_ppo, ranks, 4 * 8 * 3, {}, options))
        assert_alike(results[0], expected, ROUNDING)
        for other in results[1:]:
            assert_alike(other, results[0], 0.0)


def test_ranks_rehearse_what_one_process_rehearses() -> None:
    def options() -> dict[str, Any]:
        batches = DemonstrationBatches(toy_demonstrations(), None, 2, 2, 0)
        return {"rehearsal": batches, "rehearsal_batch_size": 15}

    env = {"action_dim": 4}
    expected = trained(_ppo, 1, 64, env, options())
    assert expected["metrics"]["train/rehearsal_loss"] > 0
    for found in run_ranks(2, lambda _: trained(_ppo, 2, 64, env, options())):
        assert_alike(found, expected, ROUNDING)


@pytest.mark.parametrize("options", [{}, {"normalize_length": False, "success_bounds": (0.0, 0.9)}])
def test_ranks_learn_by_grpo_what_one_process_learns(options: dict[str, Any]) -> None:
    """Groups of two; episodes last one to five decisions, so that ranks end a turn at different times, and it takes
    several turns."""
    expected = trained(_grpo, 1, 120, {}, options)
    assert expected["metrics"]["rollout/groups_played"] > 4
    for ranks in (2, 4):
        results = run_ranks(ranks, lambda _, ranks=ranks: trained(_grpo, ranks, 120, {}, options))
        assert_alike(results[0], expected, ROUNDING)
        for other in results[1:]:
            assert_alike(other, results[0], 0.0)


def test_a_rank_without_a_group_learns_with_the_others() -> None:
    """One rank's episodes all have the same return."""

    def work(rank: int) -> dict[str, Any]:
        return trained(_grpo, 2, 60, {"reward": 1.0} if rank == 1 else {}, {})

    first, second = run_ranks(2, work)
    assert_alike(second, first, 0.0)
    assert first["counters"][2] > 0 and 0 < first["metrics"]["rollout/groups_kept_share"] <= 0.5


def test_one_rank_is_no_rank() -> None:
    """Bit for bit."""
    expected = trained(_ppo, 1, 64, {}, {"distribution": "flow_sde"})
    (found,) = run_ranks(1, lambda _: trained(_ppo, 1, 64, {}, {"distribution": "flow_sde"}))
    assert_alike(found, expected, 0.0)


def test_without_a_seed_ranks_begin_with_the_same_weights() -> None:
    first, second = run_ranks(2, lambda _: trained(_ppo, 2, 32, {}, {"seed": None, "stirred": False}))
    assert_alike(second, first, 0.0)


# --- What they decide together ----------------------------------------------------------------------------------------


class StopAt(BaseCallback):
    """Stops after some steps."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps = steps

    def _on_step(self) -> bool:
        return self.n_calls < self.steps


@pytest.mark.parametrize("make", [_ppo, _grpo])
def test_a_callback_on_one_rank_stops_all_at_the_end_of_the_rollout(make: Callable[..., PPO]) -> None:
    def work(rank: int) -> tuple[int, int]:
        algorithm = make(2, {}, {})
        algorithm.learn(10_000, StopAt(12) if rank == 1 else None)
        return algorithm.num_timesteps, algorithm.updates

    first, second = run_ranks(2, work)
    assert first == second and first[0] < 1000
    if make is _ppo:  # eight decisions of four environments a rollout, of which the second is not learned from
        assert first == (64, 1)


def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all() -> None:
    def work(rank: int) -> tuple[dict[str, Any], dict[str, Any]]:
        algorithm = _ppo(2, {}, {"batch_size": 32})
        real = algorithm._value_loss
        if rank == 1:
            algorithm._value_loss = lambda *a: real(*a) * torch.nan  # type: ignore[method-assign]
        before = {name: p.detach().numpy().copy() for name, p in algorithm.policy.named_parameters()}
        algorithm.learn(32, log_interval=1000)
        return result_of(algorithm), before

    for result, before in run_ranks(2, work):
        assert result["metrics"]["train/skipped_steps"] == 1
        assert all(np.array_equal(result["weights"][name], before[name]) for name in before)


def test_ranks_are_counted_before_they_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy_ppo().save(tmp_path / "model.zip")
    monkeypatch.setattr(distributed, "_has_joined", False)  # as another test may have, in this process
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "here", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks_on_this_machine() == 2
    with pytest.raises(ValueError, match="several ranks, which join where an algorithm is made with its environment"):
        PPO.load(tmp_path / "model.zip", device="cpu").learn(16)
    monkeypatch.setattr(distributed, "_has_joined", True)
    assert ranks_on_this_machine() == 1
    with pytest.warns(UserWarning, match="Rank 1 trains alone: this is behind the end of"):
        PPO.load(tmp_path / "model.zip", toy_vec(), device="cpu").learn(16)
    monkeypatch.setattr(distributed, "_has_joined", False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks_on_this_machine() == 1


def test_several_ranks_do_not_write_one_run_side_by_side(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        with pytest.raises(ValueError, match=r"run is written by 2 ranks; give them a sb3_vla.runs.shared.SharedRun"):
            train(
                RunDirectory(tmp_path / f"{rank}" / "run", {}),
                "rl",
                ppo(),
                checkpoint=tmp_path / "nowhere",
                output=tmp_path / "rl",
                suite="MT10",
            )

    run_ranks(2, work)


def test_policies_that_ranks_cannot_share_are_refused() -> None:
    def work(rank: int) -> None:
        with pytest.raises(ValueError, match="Several ranks train VLAPolicy alone; got MultiInputActorCriticPolicy"):
            PPO("MultiInputPolicy", toy_vec(chunk=None), device="cpu")

    run_ranks(2, work)


# --- Imitation and evaluation -----------------------------------------------------------------------------------------


def test_ranks_imitate_what_one_process_imitates(tmp_path: Path) -> None:
    config = SFTConfig(
        model_kwargs=TINY, steps=6, batch_size=9, draws=2, action_horizon=4, bf16=False, validation_interval=3,
        validation_fraction=0.34, learning_rate=1e-4, warmup_steps=1,
    )  # fmt: skip

    def work(_: int) -> tuple[dict[str, np.ndarray], list[float], bool]:
        result = sft(toy_demonstrations(), config, progress=False, output=tmp_path / "out")
        losses = [row["train_loss"] for row in result.history]
        validated = "validation_loss" in result.history[-1]
        return {name: p.numpy() for name, p in result.model.state_dict().items()}, losses, validated

    weights, losses, _ = work(0)
    results = run_ranks(2, work)
    assert [validated for _, _, validated in results] == [True, False]
    for found, found_losses, _ in results:
        assert found_losses == pytest.approx(losses, rel=1e-5)
        for name in weights:  # Adam's steps are of full length where gradients are next to nothing
            np.testing.assert_allclose(found[name], weights[name], atol=2e-5, err_msg=name)


def test_ranks_share_an_evaluation(tmp_path: Path) -> None:
    def work(_: int) -> Any:
        env = expert_env(2)
        return evaluate(
            ExpertPolicy(), tasks=EASY, trials_per_task=3, protocol=EXPERT_PROTOCOL, vec_env=env, progress=False
        )

    expected = work(0)
    for found in run_ranks(2, work):
        assert found.trials == expected.trials


# --- Going on ---------------------------------------------------------------------------------------------------------


def _interrupted(ranks: int, folder: Path) -> None:
    def work(rank: int) -> None:
        algorithm = _ppo(ranks, {}, {"task_sampling": "signal"})
        algorithm.learn(64, log_interval=1000)
        save_algorithm(folder if rank == 0 else None, algorithm)

    run_ranks(ranks, work) if ranks > 1 else work(0)


def _continued(before: int, ranks: int, folder: Path) -> list[dict[str, Any]]:
    message = f"This training ran on {before} rank(s) and goes on with {ranks}: to"
    expected_warning = [] if before == ranks else [message]

    def work(_: int) -> dict[str, Any]:
        algorithm = _ppo(ranks, {}, {"task_sampling": "signal"})
        algorithm._setup_learn(0)  # gives it a logger
        with warnings.catch_warnings(record=True) as told:
            load_algorithm(folder, algorithm)
        assert [str(warning.message)[: len(message)] for warning in told] == expected_warning
        algorithm.learn(64, log_interval=1000, reset_num_timesteps=False)
        return result_of(algorithm)

    return run_ranks(ranks, work) if ranks > 1 else [work(0)]


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 4)])
def test_a_training_goes_on_with_any_number_of_ranks(tmp_path: Path, before: int, after: int) -> None:
    _interrupted(before, tmp_path)
    whole = functools.partial(trained, _ppo, before, 128, {}, {"task_sampling": "signal"})
    expected = run_ranks(before, lambda _: whole())[0] if before > 1 else whole()
    for found in _continued(before, after, tmp_path):
        assert_alike(found, expected, 0.0 if before == after else ROUNDING)


def test_other_environments_are_refused(tmp_path: Path) -> None:
    _interrupted(2, tmp_path)

    def work(_: int) -> None:
        algorithm = toy_ppo(toy_vec(3, privileged=True))
        algorithm._setup_learn(0)
        with pytest.raises(ValueError, match="is of 4 environments; this algorithm has 6"):
            load_algorithm(tmp_path, algorithm)

    run_ranks(2, work)


# --- Shards -----------------------------------------------------------------------------------------------------------


def _sharded(ranks: int, options: dict[str, Any], make: Callable[..., PPO] = toy_ppo) -> PPO:
    env = toy_vec(4 // ranks, horizon=3, truncates=True, privileged=True, action_dim=4)
    return toy_ppo(env, sharding="fsdp", learning_rate=1e-5, stirred=False, **options)


@pytest.mark.parametrize("trainable", ["all", pytest.param("expert", marks=pytest.mark.slow)])
def test_shards_learn_what_replicas_learn(tmp_path: Path, trainable: str) -> None:
    """Adam's small steps; with micro-batches, of which ranks have different numbers; the file of one is the other's."""

    def options() -> dict[str, Any]:
        batches = DemonstrationBatches(toy_demonstrations(), None, 2, 2, 0)
        return {"micro_batch_size": 3, "n_epochs": 2, "rehearsal": batches, "trainable": trainable}

    def work(ranks: int, rank: int) -> tuple[dict[str, Any], int, Any]:
        algorithm = _sharded(ranks, options())
        algorithm.learn(64, log_interval=1000)
        save_algorithm(tmp_path / "state" if rank == 0 and ranks == 2 else None, algorithm)
        algorithm.save(tmp_path / f"{ranks}.zip")
        held = [group for group in algorithm.policy.optimizer.param_groups for group in group["params"]]
        own = sum((p.to_local() if distributed.is_shard(p) else p).numel() for p in held)  # type: ignore[operator]
        return result_of(algorithm), own, PPO.load(tmp_path / f"{ranks}.zip").get_parameters()["policy"]

    (tmp_path / "state").mkdir()
    expected, whole, _ = work(1, 0)
    results = run_ranks(2, functools.partial(work, 2))
    for found, own, loaded in results:
        assert_alike(found, expected, 2e-6)
        assert own < 0.6 * whole  # the rest is with the other
        for name, weights in found["weights"].items():
            assert np.array_equal(loaded[name].numpy(), weights), name

    def go_on(ranks: int, _: int) -> dict[str, Any]:
        algorithm = _sharded(ranks, options())
        algorithm._setup_learn(0)
        load_algorithm(tmp_path / "state", algorithm)
        algorithm.learn(64, log_interval=1000, reset_num_timesteps=False)
        return result_of(algorithm)

    alone = go_on(1, 0)
    for found in run_ranks(2, functools.partial(go_on, 2)):
        assert_alike(found, alone, 4e-6)


def test_a_state_of_shards_is_gathered_by_the_first_rank_alone(tmp_path: Path) -> None:
    """Adam's moments are twice the weights; a rank that does not write has its own part of them and no more."""

    def moments(algorithm: PPO) -> list[np.ndarray]:
        state = [
            algorithm.policy.optimizer.state[p] for g in algorithm.policy.optimizer.param_groups for p in g["params"]
        ]
        local = [each[name] for each in state for name in ("step", "exp_avg", "exp_avg_sq")]
        return [(part.to_local() if distributed.is_shard(part) else part).numpy().copy() for part in local]  # type: ignore[operator]

    def work(rank: int) -> tuple[int, int, int, list[bool]]:
        algorithm = _sharded(2, {"n_epochs": 2})
        algorithm.learn(32, log_interval=1000)
        weights = sum(p.numel() * 4 for p in algorithm.policy.parameters() if p.requires_grad)
        with Allocated() as memory:
            state = whole_optimizer_state(algorithm.policy.optimizer, algorithm.policy)
        held = sum(value.nbytes for values in state.values() for value in values.values())
        del state
        save_algorithm(tmp_path if rank == 0 else None, algorithm)
        again = _sharded(2, {"n_epochs": 2})
        again._setup_learn(0)
        load_algorithm(tmp_path, again)
        other = _sharded(2, {"n_epochs": 2})
        other.set_parameters(algorithm.get_parameters())
        same = [
            all(np.array_equal(*pair) for pair in zip(moments(algorithm), moments(each), strict=True))
            for each in (again, other)
        ]
        return weights, held, memory.most, same

    (weights, held, _, same), (_, nothing, most, same_there) = run_ranks(2, work)
    assert held == pytest.approx(2 * weights, rel=0.01) and nothing == 0
    assert most < 1.5 * weights  # the whole weights that a rollout needs, which come back afterwards
    assert same == same_there == [True, True]


def test_a_plan_for_shards_is_what_a_rank_holds() -> None:
    """Between updates all weights beside the rank's own part of them, of gradients and of Adam's moments its part."""

    def work(rank: int) -> tuple[MemoryPlan, int, int, int]:
        algorithm, parts = _sharded(2, {}), [0]
        step = algorithm._optimizer_step

        def stepping(*arguments: Any) -> None:
            parameters = [p for group in algorithm.policy.optimizer.param_groups for p in group["params"]]
            local = [p.grad.to_local() if distributed.is_shard(p) else p.grad for p in parameters]
            parts.append(sum(gradient.nbytes for gradient in local))
            step(*arguments)

        algorithm._optimizer_step = stepping  # type: ignore[method-assign]
        algorithm.learn(32, log_interval=1000)
        policy = algorithm.policy
        shards = [p.to_local() for group in policy.optimizer.param_groups for p in group["params"]]
        weights = sum(tensor.nbytes for tensor in (*policy.parameters(), *policy.buffers(), *shards))
        state = [value for state in policy.optimizer.state.values() for value in state.values()]
        moments = sum((each.to_local() if distributed.is_shard(each) else each).nbytes for each in state)
        plan = plan_memory(
            tiny_model(action_horizon=2), trainable="all", batch_size=4, world_size=2, critic=policy.value_head,
        )  # fmt: skip
        return plan, weights, moments, max(parts)

    for plan, weights, moments, gradients in run_ranks(2, work):
        assert plan.weights == pytest.approx(weights, rel=0.1)
        assert plan.optimizer == pytest.approx(moments, rel=0.1)
        assert plan.gradients >= gradients and plan.device >= weights + moments


def test_shards_of_a_rank_without_a_group() -> None:
    def work(rank: int) -> dict[str, Any]:
        return trained(_grpo_in_shards, 2, 60, {"reward": 1.0} if rank == 1 else {}, {})

    first, second = run_ranks(2, work)
    assert_alike(second, first, 0.0)
    assert first["counters"][2] > 0


def _grpo_in_shards(ranks: int, env_kwargs: dict[str, Any], options: dict[str, Any]) -> Any:
    makers: list[Any] = [lambda: HoldAtEnd(VariedEnv(**env_kwargs))] * (8 // ranks)
    return toy_grpo(
        DummyVecEnv(makers), group_size=2, n_groups=7, n_epochs=2, sharding="fsdp", stirred=False, **options
    )


def test_what_shards_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a whole copy of the policy, which sharding='fsdp' has not"):
        toy_ppo(sharding="fsdp", kl_coef=0.1)
    with pytest.raises(ValueError, match="Unknown sharding='fsdp2'; did you mean 'fsdp'"):
        toy_ppo(sharding="fsdp2")
