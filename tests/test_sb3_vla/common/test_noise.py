"""Random numbers of a part of a batch are those that the whole batch would have had there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sb3_vla.common import batch_noise as noise

Draw = Callable[[tuple[int, ...], torch.Generator], Tensor]
DRAWS: dict[str, tuple[Draw, Draw]] = {
    "normal": (noise.normal, lambda shape, generator: torch.randn(shape, generator=generator)),
    "uniform": (noise.uniform, lambda shape, generator: torch.rand(shape, generator=generator)),
    "integers": (
        lambda shape, generator: noise.integers(2, 9, shape, generator),
        lambda shape, generator: torch.randint(2, 9, shape, generator=generator),
    ),
}


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize("kind", DRAWS)
def test_all_of_a_batch_is_what_torch_draws(kind: str) -> None:
    ours, torchs = DRAWS[kind]
    assert torch.equal(ours((6, 5), seeded()), torchs((6, 5), seeded()))


@pytest.mark.parametrize("kind", DRAWS)
def test_a_part_has_the_rows_of_the_whole(kind: str) -> None:
    ours, torchs = DRAWS[kind]
    generator = seeded()
    with noise.part_of_batch([4, 1, 5], 7):
        part = ours((3, 5), generator)
    whole = torchs((7, 5), reference := seeded())
    assert torch.equal(part, whole[[4, 1, 5]])
    assert torch.equal(generator.get_state(), reference.get_state())  # it goes on as that of the whole batch does


def test_several_draws_for_each_sample() -> None:
    with noise.part_of_batch([2, 0], 3):
        part = noise.normal((6, 4), seeded())  # row r * 2 + n is draw r for sample n
    whole = torch.randn((3, 3, 4), generator=seeded())
    assert torch.equal(part.reshape(3, 2, 4), whole[:, [2, 0]])
    with noise.part_of_batch([2, 0], 3), pytest.raises(ValueError, match="5 samples; expected a multiple of the 2 of"):
        noise.normal((5, 4))


def test_categories_are_multinomials() -> None:
    probabilities = torch.rand((40, 3, 7), generator=seeded())
    expected = torch.multinomial(probabilities.flatten(0, 1), 1, generator=seeded()).reshape(40, 3)
    assert torch.equal(noise.categories(probabilities, seeded()), expected)
    with noise.part_of_batch(range(10, 30), 40):
        assert torch.equal(noise.categories(probabilities[10:30], seeded()), expected[10:30])


def test_frequencies_of_categories() -> None:
    """5000 draws: three standard errors of the frequency of a half are 0.021."""
    torch.manual_seed(0)
    drawn = noise.categories(torch.tensor([0.5, 0.2, 0.3]).expand(5000, 3))
    frequencies = torch.bincount(drawn, minlength=3) / 5000
    assert torch.allclose(frequencies, torch.tensor([0.5, 0.2, 0.3]), atol=0.021)


def test_a_part_ends_with_its_context() -> None:
    with pytest.raises(KeyError), noise.part_of_batch([0], 2):
        raise KeyError
    assert torch.equal(noise.normal((1, 4), seeded()), torch.randn((1, 4), generator=seeded()))
