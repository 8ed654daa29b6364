"""ChunkRolloutBuffer: layout, contents, memory, and advantages against a table worked by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sb3_vla.rollouts.buffers import ChunkRolloutBuffer

CPU = torch.device("cpu")


def filled(n_steps: int = 4, n_envs: int = 3, size: int = 8) -> tuple[ChunkRolloutBuffer, list[dict[str, Any]]]:
    """A full buffer and what was put in, decision by decision."""
    generator = torch.Generator().manual_seed(0)
    buffer = ChunkRolloutBuffer(n_steps, n_envs, CPU, 0.99, 0.95)
    given = []
    for step in range(n_steps):
        entry: dict[str, Any] = {
            "observations": {
                "image": torch.randint(0, 256, (n_envs, 3, size, size), dtype=torch.uint8, generator=generator),
                "state": torch.randn(n_envs, 4, generator=generator),
            },
            "trace": {
                "chain": torch.randn(n_envs, 2, 5, 4, generator=generator),
                "denoising_index": torch.randint(4, (n_envs,), generator=generator),
            },
            "values": torch.randn(n_envs, generator=generator),
            "rewards": np.arange(n_envs) + 10.0 * step,
            "executed": np.arange(n_envs) + step + 1,
            "episode_starts": np.array([step == 0] * n_envs),
        }
        buffer.add(**entry)
        given.append(entry)
    buffer.compute_returns_and_advantage(torch.zeros(n_envs), np.zeros(n_envs, dtype=bool))
    return buffer, given


def test_contents_come_back_at_their_index() -> None:
    buffer, given = filled()
    batch = buffer.batch(torch.arange(12))
    for n in range(3):
        for step in range(4):
            index, entry = n * 4 + step, given[step]
            for stored, added in ((batch.observations, entry["observations"]), (batch.trace, entry["trace"])):
                assert stored.keys() == added.keys()
                for key in added:
                    assert stored[key].dtype == added[key].dtype
                    assert torch.equal(stored[key][index], added[key][n])
            assert batch.values[index] == entry["values"][n]
            assert batch.executed[index] == entry["executed"][n] and batch.executed.dtype == torch.int64
            assert buffer.rewards[n, step] == entry["rewards"][n]


def test_every_decision_once_per_epoch() -> None:
    buffer, _ = filled(n_steps=7, n_envs=3)
    for _ in range(2):
        minibatches = buffer.minibatches(5)
        assert [len(indices) for indices in minibatches] == [5, 5, 5, 5, 1]
        assert sorted(torch.cat(minibatches).tolist()) == list(range(21))
    assert torch.cat(buffer.minibatches(5)).tolist() != list(range(21))


def test_the_parts_of_a_batch_belong_together() -> None:
    buffer, _ = filled()
    whole = buffer.batch(torch.arange(12))
    for batch in map(buffer.batch, buffer.minibatches(5)):
        for name in ("values", "advantages", "returns", "executed"):
            assert torch.equal(getattr(batch, name), getattr(whole, name)[batch.indices])
        for key, value in {**batch.observations, **batch.trace}.items():
            assert torch.equal(value, {**whole.observations, **whole.trace}[key][batch.indices])


def test_a_generator_makes_the_order_reproducible() -> None:
    buffer, _ = filled()

    def order(seed: int) -> list[int]:
        return torch.cat(buffer.minibatches(5, torch.Generator().manual_seed(seed))).tolist()

    assert order(1) == order(1) != order(2)


def test_a_full_buffer_refuses_more_and_starts_again_in_the_same_memory() -> None:
    buffer, given = filled()
    assert buffer.full
    with pytest.raises(RuntimeError, match="holds its 4 decisions already"):
        buffer.add(**given[0])
    place = buffer.observations["image"].data_ptr()
    buffer.reset()
    assert not buffer.full
    buffer.add(**given[2])
    assert buffer.observations["image"].data_ptr() == place
    assert torch.equal(buffer.observations["state"][:, 0], given[2]["observations"]["state"])


def test_what_is_added_later_changes_nothing_stored() -> None:
    buffer = ChunkRolloutBuffer(2, 1, CPU, 0.99, 0.95)
    state = torch.ones(1, 4)
    nothing = np.zeros(1)
    buffer.add({"state": state}, {}, torch.zeros(1), nothing, nothing.astype(int), nothing)
    state += 1
    assert torch.equal(buffer.observations["state"][0, 0], torch.ones(4))


def test_memory_is_the_payload() -> None:
    """Within 10 %: one copy of each picture, nothing stored per environment step."""
    buffer, _ = filled(n_steps=16, n_envs=4, size=32)
    payload = 16 * 4 * (3 * 32 * 32 + 4 * 4 + 2 * 5 * 4 * 4 + 8 + 5 * 4 + 8)

    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, dict):
            return [t for part in value.values() for t in tensors(part)]
        return [value] if isinstance(value, Tensor) else []

    stored = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors(vars(buffer))}
    assert payload <= sum(stored.values()) <= 1.1 * payload
    for value in buffer.observations.values():
        assert value.is_contiguous() and value.shape[:2] == (4, 16)


def test_advantages_by_hand() -> None:
    """gamma = lambda = 1/2. Environment 0 goes on; 1 has an episode's end after its second decision and at the end."""
    buffer = ChunkRolloutBuffer(3, 2, CPU, 0.5, 0.5)
    table = (  # rewards, values, episode starts of the two environments
        ([1.0, 0.0], [0.5, 1.0], [1, 1]),
        ([2.0, 1.0], [1.0, 2.0], [0, 0]),
        ([3.0, 4.0], [1.5, 3.0], [0, 1]),
    )
    for rewards, values, starts in table:
        buffer.add({}, {}, torch.tensor(values), np.array(rewards), np.array([5, 5]), np.array(starts, dtype=bool))
    buffer.compute_returns_and_advantage(torch.tensor([2.0, 10.0]), np.array([False, True]))
    # delta = 1, 1.75, 2.5 and 0, -1, 1
    expected = torch.tensor([[1.59375, 2.375, 2.5], [-0.25, -1.0, 1.0]])
    torch.testing.assert_close(buffer.advantages, expected, atol=1e-6, rtol=0)
    returns = torch.tensor([[2.09375, 3.375, 4.0], [0.75, 1.0, 4.0]])
    torch.testing.assert_close(buffer.returns, returns, atol=1e-6, rtol=0)


def test_discount_per_environment_step_by_hand() -> None:
    """gamma = lambda = 1/2. Of the chunks 1, 2 and 3 steps are run: discounts 1/2, 1/4 and 1/8."""
    buffer = ChunkRolloutBuffer(3, 1, CPU, 0.5, 0.5, "env_step")
    for reward, value, executed in ((1.0, 0.5, 1), (2.0, 1.0, 2), (3.0, 2.0, 3)):
        buffer.add({}, {}, torch.tensor([value]), np.array([reward]), np.array([executed]), np.zeros(1))
    buffer.compute_returns_and_advantage(torch.tensor([8.0]), np.array([False]))
    # delta = 1 + 0.5 - 0.5, 2 + 0.5 - 1, 3 + 1 - 2; weight of the next advantage: 1/4, 1/8
    expected = torch.tensor([[1.0 + 0.25 * 1.75, 1.5 + 0.125 * 2.0, 2.0]])
    torch.testing.assert_close(buffer.advantages, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("gamma_per", ["decision", "env_step"])
def test_what_was_not_run_takes_no_time_and_is_no_sample(gamma_per: str) -> None:
    buffer = ChunkRolloutBuffer(2, 2, CPU, 0.5, 0.5, gamma_per)
    assert buffer.discounts(np.array([0, 1])).tolist() == [1.0, 0.5]
    for executed in ([1, 0], [1, 1]):
        buffer.add({}, {}, torch.zeros(2), np.zeros(2), np.array(executed), np.zeros(2))
    assert sorted(torch.cat(buffer.minibatches(2)).tolist()) == [0, 1, 3]


def test_advantages_equal_stable_baselines3() -> None:
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

    generator = np.random.default_rng(0)
    n_steps, n_envs = 20, 4
    ours = ChunkRolloutBuffer(n_steps, n_envs, CPU, 0.97, 0.9)
    box = spaces.Box(-1, 1, (1,), np.float32)
    theirs = RolloutBuffer(n_steps, box, box, "cpu", gae_lambda=0.9, gamma=0.97, n_envs=n_envs)
    for _ in range(n_steps):
        rewards, starts = generator.normal(size=n_envs), generator.random(n_envs) < 0.3
        values = torch.from_numpy(generator.normal(size=n_envs).astype(np.float32))
        ours.add({}, {}, values, rewards, np.full(n_envs, 5), starts)
        theirs.add(np.zeros((n_envs, 1)), np.zeros((n_envs, 1)), rewards, starts, values, torch.zeros(n_envs))
    last, dones = torch.randn(n_envs), np.array([True, False, True, False])
    ours.compute_returns_and_advantage(last, dones)
    theirs.compute_returns_and_advantage(last, dones)
    np.testing.assert_allclose(ours.advantages.numpy().T, theirs.advantages, atol=1e-5)
    np.testing.assert_allclose(ours.returns.numpy().T, theirs.returns, atol=1e-5)
