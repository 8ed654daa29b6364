"""Weights that never change and lie in a checkpoint already stay out of what a policy saves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

#: in the place of the frozen weights in a state, what tells them from others: SHA-256, uint8 (32,)
DIGEST = "frozen_digest"


class FrozenWeights:
    """Parameters that are elsewhere already, such as in a checkpoint; they must keep their values.

    :param names: as their module names them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = tuple(sorted(names))
        # That of billions of weights takes seconds, and most policies are never saved.
        self._digest: Tensor | None = None

    def take_out(self, module: nn.Module, state: dict[str, Any], prefix: str = "") -> None:
        """Put the digest in the place of the weights."""
        for name in self._names:
            state.pop(prefix + name)
        state[prefix + DIGEST] = self._digest_of(module).clone()

    def put_back(self, module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state with the module's own weights.

        :raises RuntimeError: as torch does for a state that does not fit, if it was trained on top of other weights.
        """
        state = dict(state)
        given = state.pop(DIGEST, None)
        own = {name: module.get_parameter(name).detach() for name in self._names}
        fits = given is None or torch.equal(given.cpu(), self._digest_of(module))
        fits &= all(torch.equal(state[name].to(own[name].device), own[name]) for name in own if name in state)
        if not fits:
            raise RuntimeError(
                "These weights were trained on top of another frozen backbone than this policy's; make the policy "
                "with the checkpoint that their training began with"
            )
        return {**own, **state}

    def _digest_of(self, module: nn.Module) -> Tensor:
        if self._digest is None:
            sha256 = hashlib.sha256()
            for name in self._names:
                weights = module.get_parameter(name).detach().cpu().contiguous()
                sha256.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
                sha256.update(weights.flatten().view(torch.uint8).numpy().data)
            self._digest = torch.tensor(list(sha256.digest()), dtype=torch.uint8)
        return self._digest


class Unfrozen:
    """A module's state without its frozen weights.

    :param module: holds them, also where it shares them with another module.
    :param frozen: which they are.
    """

    def __init__(self, module: nn.Module, frozen: FrozenWeights) -> None:
        self._module, self._frozen = module, frozen

    def state_dict(self) -> dict[str, Any]:
        """See ``torch.nn.Module.state_dict``; the digest is in the place of the frozen weights."""
        state = self._module.state_dict()
        self._frozen.take_out(self._module, state)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> Any:
        """See ``torch.nn.Module.load_state_dict``.

        :raises RuntimeError: see :meth:`FrozenWeights.put_back`.
        """
        return self._module.load_state_dict(self._frozen.put_back(self._module, state))
