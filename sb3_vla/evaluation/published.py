"""Success on MT50 as others published it, to be shown beside what is measured here; nothing of it was measured here.

The rows are those of the table in RLinf's documentation (MetaWorld example, as of v0.4) and, for Flow-Noise, of the
paper by the same authors. Its protocol is ``rlinf-160``, with 10 trials of each task for the rows of pi0 and pi0.5: 500
trials, which leave about five points of uncertainty of the average (95 %).
"""

from __future__ import annotations

from dataclasses import dataclass

_SMOLVLA = "SmolVLA paper (arXiv:2506.01844), other protocol"
_RLINF = "RLinf documentation"
_PI_RL = "piRL paper (arXiv:2510.25889)"


@dataclass(frozen=True)
class PublishedRow:
    """One row of a published table, in percent.

    :param method: what was measured.
    :param rates: mean success of the difficulty groups, in the order of :data:`mw_envs.DIFFICULTIES`.
    :param average: as printed there; the mean of the group means, up to rounding.
    :param source: where it is from.
    """

    method: str
    rates: tuple[float, float, float, float]
    average: float
    source: str


PUBLISHED = (
    PublishedRow("Diffusion Policy", (23.1, 10.7, 1.9, 6.1), 10.5, _SMOLVLA),
    PublishedRow("TinyVLA", (77.6, 21.5, 11.4, 15.8), 31.6, _SMOLVLA),
    PublishedRow("SmolVLA 2.25 B", (87.1, 51.8, 70.0, 64.0), 68.2, _SMOLVLA),
    PublishedRow("pi0 SFT", (77.9, 51.8, 53.3, 20.0), 50.8, _RLINF),
    PublishedRow("pi0 + PPO, Flow-SDE", (92.1, 74.6, 61.7, 84.0), 78.1, _RLINF),
    PublishedRow("pi0 + PPO, Flow-Noise", (91.1, 81.8, 78.3, 92.0), 85.8, _PI_RL),
    PublishedRow("pi0.5 SFT", (68.2, 37.3, 41.7, 28.0), 43.8, _RLINF),
    PublishedRow("pi0.5 + PPO, Flow-SDE", (86.4, 55.5, 75.0, 66.0), 70.7, _RLINF),
    PublishedRow("pi0.5 + PPO, Flow-Noise", (86.8, 58.1, 63.3, 56.0), 66.1, _PI_RL),
)
