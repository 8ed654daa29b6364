"""Training on a cluster: wherever environments, copies of the policy and learner run, and whatever dies, the result is
that of one process, and only what ran in a dead process is lost."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import descendants
from safetensors.torch import load_file
from stable_baselines3.common.callbacks import BaseCallback
from stand_in_ray import StandInRay
from test_launch import EVERY, LEARNING
from toy import TINY, ToyEnv, tiny_model, toy_ppo
from trainings import ppo

from sb3_vla import GRPO, PPO
from sb3_vla.checkpoints import save_checkpoint
from sb3_vla.distributed.ranks import Ranks, current_ranks
from sb3_vla.envs.shared_memory import SharedMemoryVecEnv
from sb3_vla.ray import ClusterOptions, PlacementError, launch
from sb3_vla.ray.connection import Cluster, connected
from sb3_vla.ray.envs import RayVecEnv
from sb3_vla.ray.launch import train_on_cluster
from sb3_vla.ray.learners import run_learners
from sb3_vla.ray.placement import Slot
from sb3_vla.ray.resources import ClusterResources
from sb3_vla.ray.rollout import Replicas
from sb3_vla.rollouts.stepping import Clock, step_by_halves, step_together
from sb3_vla.runs.directory import RunDirectory
from sb3_vla.runs.training import train

#: on two nodes of four slots
LAYOUTS = {
    "all shared": {"actor,env,rollout": "0-2"},
    "hybrid": {"env": "0-3", "rollout": "4-7", "actor": "0-7"},
    "disjoint": {"env": "4-5", "rollout": "6-7", "actor": "0"},
}
#: the same with several learners: as many as environments' processes, twice as many, and as many on other slots
SEVERAL = {
    "all shared": {"actor,env,rollout": "0-1"},
    "hybrid": {"env": "0-1", "rollout": "2-3", "actor": "0-3"},
    "disjoint": {"env": "4-5", "rollout": "6-7", "actor": "1-2"},
    "disjoint, elsewhere": {"env": "0-1", "rollout": "2-3", "actor": "4-5"},
}


def _simulated_cluster(connect: bool = True) -> Iterator[Any]:
    """Ray's own cluster of two nodes on one machine.

    :param connect: whether this process takes part; else only the address is of use.
    """
    ray = pytest.importorskip("ray", reason='needs Ray: pip install "sb3-vla[ray]"')
    from ray.cluster_utils import Cluster as SimulatedCluster

    arguments = {"num_cpus": 4, "object_store_memory": 200 * 2**20, "include_dashboard": False}
    simulated = SimulatedCluster(initialize_head=True, head_node_args=arguments)
    if not connect:
        simulated.add_node(num_cpus=4, object_store_memory=200 * 2**20)
        try:
            yield SimpleNamespace(address=simulated.address)
        finally:
            simulated.shutdown()
        return
    paths = os.pathsep.join(path for path in sys.path if path)
    ray.init(address=simulated.address, runtime_env={"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}})
    # Both nodes have this machine's address, so a process that connects later may become either's.
    second = simulated.add_node(num_cpus=4, object_store_memory=200 * 2**20)

    def kill_node(_: str) -> None:
        """With all that runs on it: what has lost its node ends by itself, but not at once on a busy machine."""
        on_it = descendants(second.all_processes["raylet"][0].process.pid)
        simulated.remove_node(second, allow_graceful=False)
        for process in on_it:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    ray.kill_node = kill_node
    yield ray
    ray.shutdown()
    simulated.shutdown()


@pytest.fixture(params=["stand-in", pytest.param("ray", marks=pytest.mark.slow)])
def ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "ray":
        yield from _simulated_cluster()
        return
    stand_in = StandInRay(4, 4)
    monkeypatch.setitem(sys.modules, "ray", stand_in)
    monkeypatch.setitem(sys.modules, "ray.util", stand_in.util)
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", stand_in.util.scheduling_strategies)
    yield stand_in
    stand_in.shutdown()


class FoundToy(ToyEnv):
    """Its process can be found, for a test to kill it."""

    def process(self) -> int:
        return os.getpid()


def makers(count: int, **options: Any) -> list[Callable[[], gym.Env]]:
    return [functools.partial(FoundToy, horizon=3, truncates=True, **options)] * count


def in_one_process(learn: Callable[[Any, ClusterResources | None], Any], count: int = 8) -> Any:
    env = SharedMemoryVecEnv(makers(count), "fork", num_workers=2)
    try:
        return learn(env, None)
    finally:
        env.close()


def on_cluster(layout: dict[str, str], learn: Callable[[Any, ClusterResources | None], Any], count: int = 8) -> Any:
    with connected(ClusterOptions(2, layout)) as cluster:
        resources = ClusterResources(cluster, cluster.placement["env"], cluster.placement["rollout"])
        env = resources.envs(makers(count), None)
        try:
            return learn(env, resources)
        finally:
            env.close()
            resources.leave()


def learn_ppo(
    env: Any, resources: ClusterResources | None, callback: BaseCallback | None = None, **options: Any
) -> tuple[PPO, dict[str, torch.Tensor]]:
    """Two iterations of PPO."""
    algorithm = toy_ppo(env, **{"n_steps": 4, "batch_size": 8, "learning_rate": 1e-3, **options})  # type: ignore[arg-type]
    if resources is not None:
        algorithm.replicas = resources.replicas(algorithm.policy)
    algorithm.learn(2 * 4 * env.num_envs * current_ranks().count, callback)
    return algorithm, {name: value.clone() for name, value in algorithm.policy.state_dict().items()}


def learn_ppo_by_gradients(env: Any, resources: ClusterResources | None) -> tuple[PPO, dict[str, torch.Tensor]]:
    """The same by plain gradient steps: Adam's are of full length where gradients are but rounding."""

    class Plain(BaseCallback):
        def _init_callback(self) -> None:
            optimizer = self.model.policy.optimizer
            groups = [{"params": group["params"]} for group in optimizer.param_groups]
            self.model.policy.optimizer = torch.optim.SGD(groups, lr=0.3)
            self.start = [p.detach().clone() for group in groups for p in group["params"]]

        def _on_step(self) -> bool:
            return True

        def _on_training_end(self) -> None:
            weights = [p for group in self.model.policy.optimizer.param_groups for p in group["params"]]
            assert max((p - q).abs().max() for p, q in zip(weights, self.start, strict=True)) > 2e-3

    return learn_ppo(env, resources, Plain(), learning_rate=0.3)


def learn_grpo(env: Any, resources: ClusterResources | None) -> tuple[GRPO, dict[str, torch.Tensor]]:
    """Two iterations of GRPO."""
    policy_kwargs = {"model": "compact", "model_kwargs": TINY, "distribution": "flow_sde"}
    algorithm = GRPO("VLAPolicy", env, batch_size=8, group_size=4, n_groups=2, policy_kwargs=policy_kwargs, seed=0)
    if resources is not None:
        algorithm.replicas = resources.replicas(algorithm.policy)
    algorithm.learn(2 * 8 * 3)
    return algorithm, {name: value.clone() for name, value in algorithm.policy.state_dict().items()}


def assert_same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


@pytest.fixture(scope="module")
def one_process() -> dict[str, torch.Tensor]:
    return in_one_process(learn_ppo)[1]


def test_every_layout_learns_what_one_process_learns(ray: Any, one_process: dict[str, torch.Tensor]) -> None:
    untrained = dict(toy_ppo().policy.state_dict())
    assert any(not torch.equal(value, untrained[name]) for name, value in one_process.items())
    for layout in LAYOUTS.values():
        assert_same_weights(on_cluster(layout, learn_ppo)[1], one_process)


def learn_with_resources(
    learn: Callable[[Any, ClusterResources | None], Any], resources: ClusterResources
) -> dict[str, torch.Tensor]:
    """What each of several learners does with its part of eight environments."""
    env = resources.envs(makers(8 // current_ranks().count), None)
    try:
        return learn(env, resources)[1]
    finally:
        env.close()
        resources.leave()


@pytest.mark.parametrize(
    ("layout", "learn"),
    [*((layout, learn_ppo_by_gradients) for layout in SEVERAL.values()), (SEVERAL["all shared"], learn_grpo)],
)
def test_several_learners_learn_what_one_process_learns(ray: Any, layout: dict[str, str], learn: Any) -> None:
    algorithm, expected = in_one_process(learn)
    assert algorithm.updates == 2
    options = ClusterOptions(2, layout)
    with connected(options) as cluster:
        found = run_learners(cluster, options, functools.partial(learn_with_resources, learn))
    assert found.keys() == expected.keys()
    for name, value in expected.items():  # as of ranks that torchrun starts
        torch.testing.assert_close(found[name], value, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_slots_of_several_learners() -> None:
    placement = {"env": [Slot(0, number, False) for number in range(4)], "rollout": [Slot(1, 0, False)]}
    cluster: Any = SimpleNamespace(placement=placement)
    parts = [
        ClusterResources.of_rank(cluster, Ranks(rank, 8)) for rank in range(8)
    ]  # RLinf's hybrid: env 0-3, actor 0-7
    assert [[slot.local for slot in resources.env] for resources in parts] == [[0], [0], [1], [1], [2], [2], [3], [3]]
    assert all(resources.rollout == placement["rollout"] for resources in parts)
    parts = [ClusterResources.of_rank(cluster, Ranks(rank, 3)) for rank in range(3)]
    assert [[slot.local for slot in resources.env] for resources in parts] == [[0], [1], [2, 3]]
    whole = ClusterResources.of_rank(cluster, Ranks())
    assert (whole.env, whole.rollout) == (placement["env"], placement["rollout"])


def test_learners_have_a_gpu_each() -> None:
    cluster: Any = SimpleNamespace(placement={"actor": [Slot(0, 1, True)] * 2})
    with pytest.raises(PlacementError, match="several actor processes on GPU 1; expected one learner a GPU"):
        run_learners(cluster, ClusterOptions(), print)


def process_of_rank(resources: ClusterResources) -> tuple[int, int]:
    return os.getpid(), current_ranks().count


def test_the_first_learner_is_this_process_where_it_is_on_this_node(ray: Any) -> None:
    for actor, here in {"0": True, "5": False, "0,5": True, "4-5": False}.items():
        options = ClusterOptions(2, {"actor": actor, "env,rollout": "0"})
        with connected(options) as cluster:
            process, count = run_learners(cluster, options, process_of_rank)
        assert (process == os.getpid()) == here
        assert count == len(cluster.placement["actor"]) and current_ranks().count == 1


def fail_in_second(resources: ClusterResources) -> None:
    if current_ranks().rank == 1:
        raise LookupError("no such task")
    current_ranks().wait()


@pytest.mark.parametrize("actor", ["0-1", "4-5"])
def test_what_one_learner_raises_is_told(ray: Any, actor: str) -> None:
    options = ClusterOptions(2, {"actor": actor, "env,rollout": "0"})
    with connected(options) as cluster, pytest.raises(LookupError, match=r"^no such task$"):
        run_learners(cluster, options, fail_in_second)


@pytest.mark.parametrize("learn", [functools.partial(learn_ppo, overlap=True), learn_grpo])
def test_overlap_and_groups_learn_what_one_process_learns(ray: Any, learn: Any) -> None:
    assert_same_weights(on_cluster(LAYOUTS["hybrid"], learn)[1], in_one_process(learn)[1])


def test_only_what_is_trained_is_sent(ray: Any, tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "model", tiny_model(action_horizon=2, action_dim=2))

    def learn(env: Any, resources: ClusterResources | None) -> tuple[PPO, dict[str, torch.Tensor]]:
        policy_kwargs = {"checkpoint": str(tmp_path / "model"), "trainable": "expert"}
        return learn_ppo(env, resources, policy_kwargs=policy_kwargs, stirred=False)

    algorithm, weights = on_cluster(LAYOUTS["disjoint"], learn)
    assert_same_weights(weights, in_one_process(learn)[1])
    parameters = list(algorithm.policy.parameters())
    trained = sum(parameter.numel() * 4 for parameter in parameters if parameter.requires_grad)
    assert 0 < trained < sum(parameter.numel() * 4 for parameter in parameters)
    assert algorithm.replicas is not None and algorithm.replicas.sent_bytes == trained


class Killer(BaseCallback):
    """Does something at one step, and keeps what the environments gave."""

    def __init__(self, step: int, kill: Callable[[Any], None]) -> None:
        super().__init__()
        self.step, self.kill = step, kill
        self.dones: list[np.ndarray] = []
        self.lost: list[list[int]] = []

    def _on_step(self) -> bool:
        self.dones.append(self.locals["dones"].copy())
        infos = self.locals["infos"]
        self.lost.append([i for i, info in enumerate(infos) if info.get("worker_restarted")])
        if self.n_calls == self.step:
            self.kill(self.training_env)
        return True


def test_a_dead_env_actor_costs_its_own_episodes_alone(ray: Any) -> None:
    """Of eight environments on four actors, the last two lose what they were doing at the second step."""

    def kill(env: Any) -> None:
        os.kill(env.env_method("process", indices=[7])[0], signal.SIGKILL)

    killer = Killer(4, kill)

    def learn(env: Any, resources: ClusterResources | None) -> int:
        learn_ppo(env, resources, callback=killer)
        return env.dropped_episodes

    assert on_cluster(LAYOUTS["hybrid"], learn) == 2
    assert [step for step, lost in enumerate(killer.lost) if lost] == [4]
    assert killer.lost[4] == [6, 7]
    # The others' episodes of three decisions are counted from the beginning, the two new ones' from their death.
    for step, dones in enumerate(killer.dones):
        assert dones[:6].tolist() == [step % 3 == 2] * 6
        expected = (step % 3 == 2) if step < 4 else (step - 4) % 3 == 0
        assert dones[6:].tolist() == [expected] * 2


def test_a_dead_copy_of_the_policy_changes_nothing(ray: Any, one_process: dict[str, torch.Tensor]) -> None:
    """The first copy dies in the first rollout and the second between rollouts."""

    def learn(env: Any, resources: ClusterResources | None) -> dict[str, torch.Tensor]:
        assert resources is not None

        def kill_first(_: Any) -> None:
            ray.kill(resources._replicas[0]._actors[0])

        class Both(Killer):
            def _on_rollout_end(self) -> None:
                ray.kill(resources._replicas[0]._actors[1])

        return learn_ppo(env, resources, callback=Both(2, kill_first))[1]

    assert_same_weights(on_cluster(LAYOUTS["disjoint"], learn), one_process)


def test_a_dead_node_s_work_is_done_on_the_rest(ray: Any) -> None:
    """Environments and copies of the second node go on on the first one, which gets them at once: Ray counts the dead
    node as living for a while."""

    def kill(_: Any) -> None:
        ray.unnoticed = 40
        ray.kill_node("node 1")

    killer = Killer(4, kill)

    def learn(env: Any, resources: ClusterResources | None) -> tuple[int, PPO]:
        algorithm, _ = learn_ppo(env, resources, callback=killer)
        return env.dropped_episodes, algorithm

    dropped, algorithm = on_cluster({"env": "0-1,4-5", "rollout": "6-7", "actor": "0"}, learn)
    # What a process had sent before it died still counts, so its end may show with a later decision.
    assert not any(killer.lost[:4])
    assert dropped == 4 and sorted(i for lost in killer.lost[4:] for i in lost) == [4, 5, 6, 7]
    assert algorithm.num_timesteps == 64 and algorithm.updates == 2


def test_more_processes_than_environments(ray: Any) -> None:
    with pytest.raises(PlacementError, match=r"places 4 env processes, but there are 3 environments"):
        on_cluster(LAYOUTS["hybrid"], learn_ppo, count=3)


def test_failures_reach_the_learner(ray: Any) -> None:
    """An environment that cannot be made, and weights that do not fit a copy."""
    with connected(ClusterOptions(2, LAYOUTS["hybrid"])) as cluster:
        with pytest.raises(RuntimeError, match=r"An environment of worker 0 .* failed:(.|\n)*unexpected keyword"):
            RayVecEnv(cluster, [functools.partial(ToyEnv, color="red")] * 4, cluster.placement["env"])  # type: ignore[arg-type]
        policy = toy_ppo().policy
        policy.register_parameter("stranger", torch.nn.Parameter(torch.zeros(1)))
        replicas = Replicas(cluster, cluster.placement["rollout"][:1], policy)
        with pytest.raises(Exception, match="unexpected stranger"):
            replicas.take_weights()
        replicas.close()


def metaworld(tmp_path: Path, name: str, layout: dict[str, str] | None) -> dict[str, torch.Tensor]:
    """Weights after two iterations of PPO in MetaWorld."""
    config = ppo(
        iterations=2, num_envs=2, n_steps=2, horizon=15, batch_size=4, n_epochs=1, critic_warmup=0, actor_warmup=0
    )
    if not (tmp_path / "start").exists():  # the same for all layouts
        save_checkpoint(tmp_path / "start", tiny_model(action_horizon=5))
    run = RunDirectory(tmp_path / name, {})
    arguments: dict[str, Any] = {
        "checkpoint": tmp_path / "start",
        "output": tmp_path / name / "rl",
        "suite": "MT1",
        "tasks": ["reach-v3"],
        "progress": False,
    }
    if layout is None:
        train(run, "rl", config, **arguments)
    else:
        train_on_cluster(ClusterOptions(2, layout), run, "rl", config, **arguments)
    return load_file(tmp_path / name / "rl" / "model.safetensors")


@pytest.mark.slow
def test_metaworld_on_a_cluster(ray: Any, tmp_path: Path) -> None:
    expected = metaworld(tmp_path, "alone", None)
    layout = {"env": "4-5", "rollout": "1", "actor": "0"}
    assert_same_weights(metaworld(tmp_path, "here", layout), expected)
    assert_same_weights(metaworld(tmp_path, "elsewhere", {**layout, "actor": "4"}), expected)
    for name, value in metaworld(tmp_path, "several", {**layout, "actor": "0,4"}).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-5, msg=name)


def test_the_workers_are_those_of_the_placement(ray: Any) -> None:
    cluster = Cluster(ClusterOptions(2, {"env": "0:0-2", "actor,rollout": "0"}))
    env = RayVecEnv(cluster, makers(7), cluster.placement["env"])
    assert [len(share) for share in env.shares] == [2, 2, 3]
    assert len(set(env.env_method("process"))) == 3
    env.close()


class Found:
    """Says on which node it runs."""

    def __init__(self, slot: Slot) -> None: ...

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())


def test_a_process_runs_on_the_node_of_its_slot(ray: Any) -> None:
    """Also on one that has joined a moment ago."""
    cluster = Cluster(ClusterOptions(2, {"env": "0-1,4-5", "rollout": "0", "actor": "0"}))
    names = [node.name for node in cluster.nodes()]
    actors = [cluster.start(Found, slot) for slot in cluster.placement["env"]]
    stand_in = isinstance(ray, StandInRay)
    found = [actor.node if stand_in else ray.get(actor.node.remote()) for actor in actors]
    assert found == [names[0], names[0], names[1], names[1]]
    for actor in actors:
        ray.kill(actor)


class SleepyToy(FoundToy):
    """A chunk takes time, but no processor."""

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        time.sleep(0.1)
        return super().step(action)


class SleepyReplicas:
    """Copies that decide in 0.1 s a batch of two, without a processor."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy

    def take_weights(self) -> None: ...

    @torch.no_grad()
    def decide(self, observations: dict[str, np.ndarray], places: np.ndarray, total: int) -> Any:
        time.sleep(0.05 * len(observations["state"]))
        prepared = self.policy.prepare({key: torch.as_tensor(value) for key, value in observations.items()})
        return (prepared, *self.policy.decide(prepared))


def test_overlap_hides_the_shorter_of_simulation_and_inference(ray: Any) -> None:
    """Two actors of two environments: a round simulates for 0.2 s and decides for 0.2 s, one after the other or not.

    In halves, each actor runs one environment of each half, 0.1 s, while the other half's 0.1 s of decisions go on.
    """
    cluster = Cluster(ClusterOptions(2, {"env": "0-1", "rollout": "2", "actor": "0"}))
    env = RayVecEnv(cluster, [functools.partial(SleepyToy, horizon=3)] * 4, cluster.placement["env"])
    algorithm = toy_ppo(env)  # type: ignore[arg-type]
    algorithm.replicas = SleepyReplicas(algorithm.policy)  # type: ignore[assignment]
    seen: Any = algorithm.env  # with its pictures transposed
    seconds = {}
    for overlap, steps in ((False, step_together), (True, step_by_halves)):
        observations: Any = seen.reset()
        started = time.perf_counter()
        assert sum(1 for _ in steps(seen, algorithm._decide, observations, 10, Clock())) == 10
        seconds[overlap] = time.perf_counter() - started
    env.close()
    together, overlapped = 10 * (0.2 + 0.2), 10 * 0.2 + 0.1
    assert together <= seconds[False]
    print(f"{seconds[False]:.2f} s together, {seconds[True]:.2f} s by halves")
    # What is not slept is at most twice as much by halves, which have twice as many calls.
    assert overlapped <= seconds[True] <= overlapped + 2 * (seconds[False] - together) + 0.25 * (together - overlapped)


def dying_train(folder: Path, stage: str, config: Any, arguments: dict[str, Any], resources: ClusterResources) -> None:
    """A training whose last learner is killed the first times."""
    ranks, tries = current_ranks(), folder / "tries"
    if ranks.rank == ranks.count - 1:
        done = tries.read_text() if tries.exists() else ""
        tries.write_text(f"{done}{'resumed' if arguments.get('resume') else 'begun'} ")
        if len(done.split()) < arguments["deaths"]:
            os.kill(os.getpid(), signal.SIGKILL)
    ranks.wait()


@pytest.mark.parametrize(("actor", "deaths"), [("5", 2), ("5", 3), ("0,5", 2), ("4-5", 2)])
def test_a_learner_that_dies_is_begun_again(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, actor: str, deaths: int
) -> None:
    monkeypatch.setattr(launch, "_train", dying_train)
    run = RunDirectory(tmp_path / "run", {})

    def begin() -> None:
        placement = {"actor": actor, "env,rollout": "0"}
        train_on_cluster(ClusterOptions(2, placement), run, "rl", ppo(), deaths=deaths)

    with pytest.warns(UserWarning, match="goes on from its last checkpoint"):
        if deaths == 2:
            begin()
        else:
            with pytest.raises(RuntimeError, match="A learner died 3 times without a checkpoint between"):
                begin()
    assert (run.path / "tries").read_text().split() == ["begun", "resumed", "resumed"]


def kin(*names: str) -> list[str]:
    """Command lines of this process's descendants that hold one of these names."""
    return [command for command in descendants().values() if any(name in command for name in names)]


def recipe(cluster: SimpleNamespace, folder: Path, start: Path) -> subprocess.Popen[str]:
    """A recipe's six iterations by two learners on the two nodes, a checkpoint after each."""
    settings = [setting for setting in [*EVERY, *LEARNING] if "train.num_workers" not in setting]
    settings += ["runner.max_epochs=6", "runner.save_interval=1", "algorithm.rehearsal_coef=0"]
    settings += ["algorithm.critic_warmup=0", "algorithm.actor_warmup=0"]
    settings += [f"actor.model.model_path={start}", f"runner.logger.log_path={folder}", "cluster.num_nodes=2"]
    settings += ['cluster.component_placement={"env": "1,5", "rollout": "2,6", "actor": "0,4"}']
    return subprocess.Popen(
        [sys.executable, "-m", "sb3_vla", "train", "metaworld_50_ppo_compact", *settings],
        env={**os.environ, "RAY_ADDRESS": cluster.address, "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_whose_trainer_is_killed_goes_on(tmp_path: Path) -> None:
    """SIGKILL of the process that the user started, which is the first learner and holds the cluster's actors."""
    save_checkpoint(tmp_path / "start", tiny_model(action_horizon=5))
    actors = ("LearnerActor", "EnvActor", "RolloutActor")
    with contextmanager(_simulated_cluster)(connect=False) as ray:
        whole = recipe(ray, tmp_path / "whole", tmp_path / "start")
        output, _ = whole.communicate(timeout=300)
        assert whole.returncode == 0, output
        run = tmp_path / "killed" / "metaworld_50_ppo_compact"
        trainer = recipe(ray, tmp_path / "killed", tmp_path / "start")
        deadline = time.monotonic() + 300
        while not (run / "checkpoints" / "ppo" / "step-00000002").exists():
            assert trainer.poll() is None and time.monotonic() < deadline, trainer.communicate()[0]
            time.sleep(0.05)
        assert all(kin(name) for name in actors)
        trainer.kill()
        trainer.communicate()
        deadline = time.monotonic() + 60
        while left := kin(*actors):
            assert time.monotonic() < deadline, left
            time.sleep(0.5)
        assert not (run / "ppo").exists()
        rows = len(RunDirectory(run).metrics())  # none of them is half a row
        again = recipe(ray, tmp_path / "killed", tmp_path / "start")
        output, _ = again.communicate(timeout=300)
        assert again.returncode == 0, output
    expected = tmp_path / "whole" / "metaworld_50_ppo_compact"
    assert 2 <= rows <= len(RunDirectory(run).metrics())
    for key in ("time/total_timesteps", "time/env_steps", "time/iterations", "env/episode_len"):
        found, wanted = ([row.get(key) for row in RunDirectory(path).metrics()] for path in (run, expected))
        assert found == wanted, key
    assert_same_weights(load_file(run / "ppo" / "model.safetensors"), load_file(expected / "ppo" / "model.safetensors"))


def test_nodes_are_numbered_from_the_launching_one(ray: Any) -> None:
    options = ClusterOptions(2)
    here = Cluster(options)
    other = here.nodes()[1].name
    assert [node.name for node in Cluster(options, other).nodes()] == [other, here.first]
