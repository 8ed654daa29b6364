"""Evaluation protocols: what success depends on beside the policy and the trials."""

from __future__ import annotations

from dataclasses import dataclass

from mw_envs.tasks import did_you_mean
from sb3_vla.common.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """
    What success depends on beside the policy and the trials.

    :param name: printed with every result
    :param horizon: environment steps per episode (80 are one second)
    :param action_chunk: actions executed per decision; ``None`` takes the policy's own chunk
    :param settle_steps: zero actions after a reset, not counted
    :param terminate_on_success: end the episode at the first success. Success at any step counts either way, but only
        an episode that runs on tells whether success lasts (``success_at_end``)
    """

    name: str
    horizon: int
    action_chunk: int | None
    settle_steps: int
    terminate_on_success: bool = True

    def __str__(self) -> str:
        chunk = "the policy's chunk" if self.action_chunk is None else f"chunk {self.action_chunk}"
        return f"{self.name} ({self.horizon} steps, {chunk}, {self.settle_steps} settle steps, success at any step)"


# Seeds of trials begin here; those of training and demonstrations stay below, so that no training episode is a trial.
TRIAL_SEED = 2**31
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # RLinf's table: its stand-alone script.
        Protocol("rlinf-160", horizon=160, action_chunk=5, settle_steps=15),
        # RLinf's evaluation within training on MT50, which settles for one step more than the script.
        Protocol("rlinf-100", horizon=100, action_chunk=5, settle_steps=16),
        # Evo-1's client, whose data and evaluation FabriVLA and others took over: 15 of 50 predicted actions are
        # executed. Its camera stands elsewhere; here the policy sees what it was trained on.
        Protocol("evo1-400", horizon=400, action_chunk=15, settle_steps=1),
        # LeRobot's evaluation command, with MetaWorld's own step limit.
        Protocol("lerobot-500", horizon=500, action_chunk=None, settle_steps=0),
    )
}


def find_protocol(protocol: str | Protocol) -> Protocol:
    """
    Look a protocol up by name; a protocol itself is returned as it is.

    :param protocol: a name in :data:`PROTOCOLS`, or a protocol of your own
    :return: the protocol
    :raises ValueError: for an unknown name; the message offers the nearest known one
    """
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise InputError(f"Unknown evaluation protocol {protocol!r}; {did_you_mean(protocol, PROTOCOLS)}.")
    return PROTOCOLS[protocol]
