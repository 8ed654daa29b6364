"""Copies of the policy on other accelerators that decide in the learner's place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sb3_vla.common.batch_noise import part_of_batch
from sb3_vla.policies.vla_policy import VLAPolicy
from sb3_vla.ray.connection import Cluster, settle
from sb3_vla.ray.placement import Slot
from sb3_vla.rollouts.stepping import Decided

#: consecutive crashes of a copy after which we give up
MAX_CONSECUTIVE_CRASHES = 3


class RolloutActor:
    """A copy of the policy.

    :param slot: where it runs.
    :param arguments: of VLAPolicy; a checkpoint among them is read on this node.
    :param threads: of the learner, because their number may change how a sum is rounded.
    """

    def __init__(self, slot: Slot, arguments: Mapping[str, Any], threads: int) -> None:
        settle(slot)
        if not slot.is_gpu:
            torch.set_num_threads(threads)
        self._device = torch.device("cuda" if slot.is_gpu else "cpu")
        self._policy = VLAPolicy(**arguments).to(self._device)
        self._policy.set_training_mode(False)

    def take_state(self, state: Mapping[str, Tensor], noise_scale: float) -> None:
        """Take all weights but those that a checkpoint holds, whose digest is compared.

        :param noise_scale: factor of the exploration noise.
        """
        self._policy.load_state_dict(state)
        self._policy.distribution.noise_scale = noise_scale

    @torch.no_grad()
    def take_weights(self, weights: Mapping[str, Tensor], noise_scale: float) -> None:
        """Take the weights that training changes.

        :param weights: by parameter name.
        """
        own = dict(self._policy.named_parameters())
        for name, value in weights.items():
            own[name].copy_(value)
        self._policy.distribution.noise_scale = noise_scale

    @torch.no_grad()
    def decide(
        self,
        observations: Mapping[str, npt.NDArray[Any]],
        places: npt.NDArray[np.int64],
        total: int,
        generators: list[Tensor],
    ) -> tuple[Any, list[Tensor]]:
        """Decide as the learner would, and hand its generators back.

        :param places: see :meth:`Replicas.decide`.
        :param total: see there.
        :param generators: their states.
        :return: the decision, on the CPU, and the states after it.
        """
        _set_generators(generators, self._device)
        # Ray's arrays are read-only, of which torch warns.
        arrays = {key: np.array(value) for key, value in observations.items()}
        prepared = self._policy.prepare(
            {key: torch.as_tensor(value, device=self._device) for key, value in arrays.items()}
        )
        with part_of_batch(places, total):
            chunk, values, trace = self._policy.decide(prepared)
        cpu = [{key: value.cpu() for key, value in part.items()} for part in (prepared, trace)]
        return (cpu[0], chunk.cpu(), values.cpu(), cpu[1]), _generators(self._device)


class Replicas:
    """Copies of the learner's policy, one in each slot, that decide in turn.

    The learner's generators travel with a batch, so that what is drawn, and the result of a training, does not depend
    on how many copies there are or where. At the beginning of a rollout they get the weights that training changes;
    all others they load themselves or get once. A copy that dies is replaced, and its batch decided again.

    :ivar sent_bytes: size of the weights that went out for the last rollout.

    :param cluster: the connection.
    :param slots: where they run.
    :param policy: the learner's.
    """

    def __init__(self, cluster: Cluster, slots: Sequence[Slot], policy: VLAPolicy) -> None:
        self._cluster = cluster
        self._slots = list(slots)
        self._policy = policy
        self._actors: list[Any] = [None] * len(slots)
        self._ready: list[Any] = [None] * len(slots)  # answers of copies to the weights that they began with
        self._turn = 0
        self.sent_bytes = 0
        for number in range(len(slots)):
            self._begin(number, cluster.start)

    def take_weights(self) -> None:
        """Bring all copies to the learner's present weights and noise scale."""
        weights = {name: p.detach().cpu() for name, p in self._policy.named_parameters() if p.requires_grad}
        self.sent_bytes = sum(value.numel() * value.element_size() for value in weights.values())
        shared = self._cluster.ray.put(weights)  # fetched once by each node
        noise_scale = self._policy.distribution.noise_scale
        under_way = [actor.take_weights.remote(shared, noise_scale) for actor in self._actors]
        for number, answer in enumerate(under_way):
            try:
                self._cluster.ray.get([self._ready[number], answer])
            except self._cluster.lost():
                self._begin(number, self._cluster.restart)  # with these weights

    def decide(
        self, observations: Mapping[str, npt.NDArray[Any]], places: npt.NDArray[np.int64], total: int
    ) -> Decided:
        """As ``VLAPolicy.prepare`` and ``VLAPolicy.decide``; torch's generators go on as if it had been done here.

        :param places: of these samples in the batch for which noise is drawn, see :mod:`sb3_vla.common.batch_noise`.
        :param total: size of that batch.
        """
        device = self._policy.device
        generators = _generators(device)
        number = self._turn % len(self._actors)
        self._turn += 1
        found, after = self._ask(
            number, lambda actor: actor.decide.remote(dict(observations), places, total, generators)
        )
        _set_generators(after, device)
        return found

    def close(self) -> None:
        """End the copies."""
        for actor in self._actors:
            self._cluster.ray.kill(actor)
        self._actors = []

    def _ask(self, number: int, request: Callable[[Any], Any]) -> Any:
        for crash in range(1, MAX_CONSECUTIVE_CRASHES + 1):
            try:
                answer = request(self._actors[number])
                return self._cluster.ray.get([self._ready[number], answer])[1]
            except self._cluster.lost() as error:
                if crash == MAX_CONSECUTIVE_CRASHES:
                    raise RuntimeError(
                        f"Copy {number} of the policy died {crash} times at the same request, so it is not replaced "
                        f"again ({error}). Usually it ran out of memory"
                    ) from error
                self._begin(number, self._cluster.restart)
        raise AssertionError

    def _begin(self, number: int, start: Callable[..., Any]) -> None:
        """Put a copy into its slot, with the learner's present weights."""
        arguments = self._policy._get_constructor_parameters()
        actor = start(RolloutActor, self._slots[number], arguments, torch.get_num_threads())
        state = {name: value.cpu() for name, value in self._policy.state_dict().items()}
        self._ready[number] = actor.take_state.remote(state, self._policy.distribution.noise_scale)
        self._actors[number] = actor


def _generators(device: torch.device) -> list[Tensor]:
    """States of torch's generators from which a policy on a device draws."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]


def _set_generators(states: list[Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0].clone())
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].clone(), device)
