"""Memory that training a model takes, known before it starts: the update is played through without any numbers.

Parameters and what comes of them are fake tensors, which have a shape, a type and a life but no contents, so that a
model of billions of parameters, also one on the meta device, is planned in seconds on any machine. What the forward
and backward pass hold at their worst moment is counted as they run, not estimated by a formula of one architecture;
of a stack of frozen layers that are alike, one is run and counts for the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from mw_envs.tasks import encode_instruction
from sb3_vla.common.errors import InputError
from sb3_vla.common.precision import autocast
from sb3_vla.distributions import ActionDistribution
from sb3_vla.models.base import PERCEPTION, VLAModel
from sb3_vla.models.prompts import PromptTokenizer
from sb3_vla.models.recomputing import Recomputing

GIB = 2**30
#: share of a device left to what a plan does not count: the driver's context, fragments, workspaces of kernels
HEADROOM = 0.1
# A sentence as long as MetaWorld's longest.
_SENTENCE = "Push the puck into the goal, bypassing a wall on the way"
_FLOAT = 4


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a training takes, on each rank.

    :param weights: of model, distribution and critic, trained or not, as a rollout needs them; and this rank's shards.
    :param copies: of what is trained: averaged weights, or the anchor of a divergence; and what a distribution copied.
    :param gradients: of what is trained.
    :param optimizer: state of the optimizer.
    :param activations: what an update holds at its worst moment besides, for one micro batch.
    :param rollout: what a decision of all environments holds at its worst moment, besides weights.
    :param prefix_per_decision: what a rollout keeps of a decision where it keeps what a frozen backbone perceived.
    :param buffer: the rollout, which lies in the machine's own memory, not on the device.
    :param settings: what was planned, for the table.
    :param released: of the weights those that an update gives back, where they are in shards.
    :param compared: what an update compares each decision with, and keeps in main memory beside the rollout: the
        rollout's log-probability, mean and deviation, which are a vocabulary wide for tokens, and a reference's.
    """

    weights: int
    copies: int
    gradients: int
    optimizer: int
    activations: int
    rollout: int
    prefix_per_decision: int
    buffer: int
    settings: str
    released: int = 0
    compared: int = 0

    @property
    def device(self) -> int:
        """On the device at the worst moment, of updates and rollouts, which take turns."""
        update = self.gradients + self.activations - self.released
        return self.weights + self.copies + self.optimizer + max(update, self.rollout)

    def rows(self) -> list[tuple[str, int]]:
        """What takes how many bytes."""
        return [
            ("weights", self.weights),
            ("copies of what is trained", self.copies),
            ("gradients", self.gradients),
            ("optimizer state", self.optimizer),
            ("activations of a micro batch", self.activations),
            ("a decision of all environments", self.rollout),
            ("device, at most", self.device),
            ("perception kept per decision", self.prefix_per_decision),
            ("rollout buffer, in main memory", self.buffer),
            ("compared with, in main memory", self.compared),
        ]

    def __str__(self) -> str:
        """A table in GiB."""
        return "\n".join([self.settings, *(f"{name:<32}{size / GIB:>10.3f} GiB" for name, size in self.rows())])

    def check(self, available: int, main_memory: int | None = None) -> None:
        """Refuse what does not fit.

        :param available: bytes of the device; a tenth of it is left to what is not counted.
        :param main_memory: bytes of the machine, for the rollout; None where it is not known.
        :raises ValueError: with the table, and what to change, what helps most first.
        """
        usable = int(available * (1 - HEADROOM))
        if self.device > usable:
            raise InputError(
                f"This training needs {self.device / GIB:.1f} GiB on the device; {usable / GIB:.1f} GiB of its "
                f"{available / GIB:.1f} GiB are to be had. {self._advice(usable)}\n{self}"
            )
        rollout = self.buffer + self.compared
        if main_memory is not None and rollout > main_memory:
            raise InputError(
                f"The rollout buffer needs {rollout / GIB:.1f} GiB of main memory; {main_memory / GIB:.1f} GiB are "
                f"free. Take fewer decisions or environments a rollout, or cache_perception=False\n{self}"
            )

    def _advice(self, usable: int) -> str:
        standing = self.weights + self.copies + self.gradients + self.optimizer
        if standing <= usable and self.rollout <= usable - self.weights - self.copies - self.optimizer:
            return "Lower micro_batch_size, set gradient_checkpointing=True, or bf16=True."
        if self.gradients + self.optimizer + self.copies > self.weights:
            return (
                'What is trained is too much for one device: train less (trainable="expert" or "adaptive"), train '
                'adapters (trainable="lora"), or spread it over more ranks.'
            )
        return (
            'Weights alone take most of it: keep the frozen backbone in bfloat16 (frozen_bf16=True), trainable="lora".'
        )


def plan_memory(
    model: VLAModel,
    *,
    trainable: str | None = None,
    batch_size: int,
    bf16: bool = False,
    gradient_checkpointing: bool = False,
    world_size: int = 1,
    num_envs: int = 1,
    decisions: int = 0,
    cache_perception: bool = False,
    denoisings: int = 1,
    distribution: ActionDistribution | None = None,
    critic: nn.Module | None = None,
    noted: int = 0,
    copies: int = 0,
    optimizer_states: int = 2,
) -> MemoryPlan:
    """Play an update and a decision through without numbers.

    :param model: may be on the meta device; it is left as it was. Adapters, where wanted, are in it already.
    :param trainable: what is trained, see :meth:`VLAModel.set_trainable`; None for the model's default.
    :param batch_size: decisions of a micro batch.
    :param bf16: autocast of the update, as the device that is planned for will have it.
    :param gradient_checkpointing: see :meth:`VLAModel.set_gradient_checkpointing`.
    :param world_size: ranks over which what is trained, its gradients and its optimizer state are spread (FSDP2); 1
        where each rank holds all of it, as with DDP. Between updates each rank has all weights beside its shards.
    :param num_envs: environments of this rank.
    :param decisions: of each in a rollout.
    :param cache_perception: whether the rollout keeps what a frozen backbone perceived.
    :param denoisings: denoising steps with a gradient, per decision: one for Flow-SDE, all of them for Flow-Noise.
    :param distribution: that acts: what it learns, what it has copied and what the rollout keeps of its draws count.
        None for imitation. It must be on the CPU or the meta device, and may hold parameters of the model.
    :param critic: what is trained beside it; None for none.
    :param noted: bytes that the rollout keeps of a decision beside what the model reads and what was drawn.
    :param copies: of what is trained: 1 for imitation's averaged weights, 1 for the anchor of a divergence.
    :param optimizer_states: numbers that the optimizer keeps per parameter; Adam's two moments.
    :raises ValueError: for a number below its least value, or a part that the model has not.
    """
    for name, value, least in (
        ("batch_size", batch_size, 1),
        ("world_size", world_size, 1),
        ("num_envs", num_envs, 1),
        ("decisions", decisions, 0),
        ("denoisings", denoisings, 1),
    ):
        if value < least:
            raise InputError(f"plan_memory {name}={value}; expected at least {least}")
    chosen = model.default_trainable if trainable is None else trainable
    with _left_as_it_was(model), _full_prompts(model):
        model.set_trainable(chosen)
        if gradient_checkpointing:
            model.set_gradient_checkpointing(True)
        own = [*model.parameters(), *model.buffers()]
        beside = _apart([*_tensors(distribution), *_tensors(critic)], own)
        trained = [tensor for tensor in (*own, *beside) if tensor.requires_grad]
        # What a distribution froze is a copy that it made of the model.
        copied = [tensor for tensor in _apart(_tensors(distribution), own) if not tensor.requires_grad]
        frozen = [tensor for tensor in _apart([*own, *beside], copied) if not tensor.requires_grad]
        key = (*_likeness(model), *_likeness(distribution), batch_size, bf16, num_envs, denoisings)
        if key not in _PLAYED:
            _PLAYED[key] = _play(model, distribution, batch_size, bf16, num_envs, denoisings)
        played = _PLAYED[key]
        read = sum(_bytes(value) for value in _observation(model, 1, FakeTensorMode()).values())
        total, learning = (sum(p.numel() for p in some) for some in (model.parameters(), _learning(model)))
        gathered = _gathered(model, sum(map(_bytes, trained))) if world_size > 1 else 0
    kept = played.drawn + noted + (played.prefix if cache_perception else read)
    whole = sum(map(_bytes, trained))
    ours = -(-whole // world_size)
    numbers = -(-sum(p.numel() for p in trained) // world_size)
    return MemoryPlan(
        weights=whole + sum(map(_bytes, frozen)) + (ours if world_size > 1 else 0),
        copies=copies * ours + sum(map(_bytes, copied)),
        gradients=ours + gathered,
        optimizer=optimizer_states * numbers * _FLOAT,
        activations=played.activations,
        rollout=played.rollout,
        prefix_per_decision=played.prefix,
        buffer=num_envs * decisions * kept,
        settings=(
            f"{type(model).__name__}, trainable={chosen}: {learning:,} of {total:,} "
            f"parameters; micro batch {batch_size}, bf16={bf16}, gradient_checkpointing={gradient_checkpointing}, "
            f"{world_size} rank{'s' if world_size > 1 else ''}"
        ),
        released=max(whole - gathered, 0) if world_size > 1 else 0,
        compared=num_envs * decisions * played.compared * (1 + copies),
    )


def _tensors(module: nn.Module | None) -> list[Tensor]:
    return [] if module is None else [*module.parameters(), *module.buffers()]


def _apart(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    """Those that are not among others."""
    known = {id(tensor) for tensor in others}
    return [tensor for tensor in tensors if id(tensor) not in known]


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _gathered(model: VLAModel, whole: int) -> int:
    """Of weights in shards, bytes that are whole at a time in an update: a block, the next one, which is on its way,
    and all that is in no block."""
    blocks = [sum(map(_bytes, _learning(block))) for block in model.sharding_units()]
    return min(whole, whole - sum(blocks) + 2 * max(blocks, default=0))


@dataclass(frozen=True)
class _Played:
    """Bytes of an update and of a decision at their worst moments; and of what is perceived, drawn, and compared with
    later, for one environment."""

    activations: int
    rollout: int
    prefix: int
    drawn: int
    compared: int


#: what was played already: recipes differ in much that it does not depend on
_PLAYED: dict[Hashable, _Played] = {}


def _likeness(module: VLAModel | ActionDistribution | None) -> tuple[Hashable, ...]:
    """What models, or distributions, that take the same memory have in common."""
    if module is None:
        return ()
    tensors = [*module.named_parameters(), *module.named_buffers()]
    likeness = [(name, tensor.shape, tensor.dtype, tensor.requires_grad) for name, tensor in tensors]
    return type(module), repr(getattr(module, "config", None)), _settings(module), tuple(likeness)


def _play(
    model: VLAModel,
    distribution: ActionDistribution | None,
    batch_size: int,
    bf16: bool,
    num_envs: int,
    denoisings: int,
) -> _Played:
    stand_in = _StandIn(model, distribution)
    fake = stand_in.fake
    activations = stand_in.run(lambda: _update(model, _observation(model, batch_size, fake), bf16, denoisings))
    prefix = drawn = compared = 0

    def decide() -> None:
        nonlocal prefix, drawn
        with autocast(bf16):
            perceived = model.perceive(_observation(model, num_envs, fake))
        prefix = sum(_bytes(value) for key, value in perceived.items() if key.startswith(PERCEPTION)) // num_envs
        if distribution is None:
            _loss(model, perceived, bf16, 1)
            return
        with autocast(bf16):
            _, trace = distribution.sample(model, model.encode(perceived))
        drawn = sum(map(_bytes, trace.values())) // num_envs

    def compare() -> None:
        nonlocal compared
        assert distribution is not None
        with autocast(bf16):
            context = model.encode(_observation(model, 1, fake))
            kept = distribution.transition(model, context, distribution.sample(model, context)[1])
        compared = sum(map(_bytes, kept)) + _FLOAT  # and the log-probability

    with torch.no_grad():
        rollout = stand_in.run(decide)
        if distribution is not None:
            stand_in.run(compare)
    return _Played(activations, rollout, prefix, drawn, compared)


class _StandIn:
    """A model, and a distribution, whose parameters are fake."""

    def __init__(self, model: VLAModel, distribution: ActionDistribution | None) -> None:
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.model = model
        self.distribution = distribution

    def run(self, call: Callable[[], None]) -> int:
        """Bytes that a call holds at its worst moment, besides the model."""
        calling = _Calling(self.model, self.distribution, call)
        tensors = self._tensors(calling)
        with _LiveBytes() as counted, _one_of_alike(self.model, counted):
            torch.func.functional_call(calling, tensors, ())
        return counted.peak

    def _tensors(self, calling: nn.Module) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        with self.fake:
            for name, parameter in calling.named_parameters():
                like = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                tensors[name] = like.requires_grad_(parameter.requires_grad)
        for tensor in tensors.values():
            if tensor.requires_grad:  # counted apart, so they leave at once
                tensor.register_post_accumulate_grad_hook(_forget_gradient)
        for name, buffer in calling.named_buffers():  # small, and prompts are made of some
            missing = buffer.device.type == "meta"
            tensors[name] = torch.ones(buffer.shape, dtype=buffer.dtype) if missing else buffer.cpu()
        return tensors


class _Calling(nn.Module):
    """A call during which the model's tensors are others, recomputation in the backward pass included."""

    def __init__(self, model: VLAModel, distribution: ActionDistribution | None, call: Callable[[], None]) -> None:
        super().__init__()
        self.model = model
        self.distribution = distribution
        self.call = call

    def forward(self) -> Any:
        return self.call()


class _LiveBytes(TorchDispatchMode):
    """Counts the storages of fake tensors that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = tree_leaves((args, kwargs))
        for tensor in given:  # such as the parameters
            if isinstance(tensor, FakeTensor):
                self._known.add(tensor.untyped_storage())
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor):
                self._watch(tensor.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._leave, size).atexit = False

    def _leave(self, size: int) -> None:
        self.live -= size


@contextmanager
def _one_of_alike(model: nn.Module, counted: _LiveBytes) -> Iterator[None]:
    """Run one layer of each kind, of those that keep nothing for a gradient; the others hold what it held and give what
    it gave, without contents."""
    layers = [module for module in model.modules() if isinstance(module, Recomputing)]
    run: dict[Hashable, tuple[int, list[Any], Any]] = {}
    for layer in layers:
        layer.forward = _run_once(layer, counted, run)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _run_once(
    layer: nn.Module, counted: _LiveBytes, run: dict[Hashable, tuple[int, list[Any], Any]]
) -> Callable[..., Any]:
    """A layer's forward pass, which is skipped where ``run`` has one alike: its peak and its results."""
    forward = layer.forward
    # What tensors do not show: numbers of heads, rates, widths of windows.
    told_layer = tuple((name, type(part), part.extra_repr(), _settings(part)) for name, part in layer.named_modules())

    def call(*args: Any, **kwargs: Any) -> Any:
        given, spec = tree_flatten((args, kwargs))
        own = [*layer.named_parameters(), *layer.named_buffers()]
        read = [*given, *(tensor for _, tensor in own)]
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in read):
            return forward(*args, **kwargs)
        told = tuple(_shape(value) if isinstance(value, Tensor) else repr(value) for value in read)
        key = told_layer, tuple(name for name, _ in own), str(spec), told, torch.is_autocast_enabled("cpu")
        if key in run:
            above, results, result_spec = run[key]
            counted.peak = max(counted.peak, counted.live + above)
            some = next(value for value in given if isinstance(value, FakeTensor))
            made = [some.new_empty_strided(size, stride, dtype=dtype) for size, stride, dtype in results]
            return tree_unflatten(made, result_spec)
        before, highest, counted.peak = counted.live, counted.peak, counted.live
        result = forward(*args, **kwargs)
        above, counted.peak = counted.peak - before, max(highest, counted.peak)
        results, result_spec = tree_flatten(result)
        fake = all(isinstance(value, FakeTensor) for value in results)
        # Not where a result is an input, or something else stays.
        if fake and sum(map(_bytes, results)) == counted.live - before:
            run[key] = above, [_shape(value) for value in results], result_spec
        return result

    return call


def _settings(module: nn.Module) -> str:
    """Numbers and words that are a module's attributes, but for which of several it is."""
    plain = (bool, int, float, str, type(None))
    return repr({k: v for k, v in sorted(vars(module).items()) if isinstance(v, plain) and k != "layer_idx"})


def _shape(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _update(model: VLAModel, observation: dict[str, Tensor], bf16: bool, denoisings: int) -> None:
    _loss(model, observation, bf16, denoisings).backward()


def _loss(model: VLAModel, observation: dict[str, Tensor], bf16: bool, denoisings: int) -> Tensor:
    """Imitation's: it runs what a ratio runs, the encoding and one denoising of it, or several."""
    count = len(next(iter(observation.values())))
    actions = torch.zeros(count, model.action_horizon, model.action_dim)
    mask = torch.ones(count, model.action_horizon, dtype=torch.bool)
    with autocast(bf16):
        return model.imitation_loss(observation, actions, mask, draws=denoisings)


def _observation(model: VLAModel, count: int, fake: FakeTensorMode) -> dict[str, Tensor]:
    sentence = torch.from_numpy(np.array(encode_instruction(_SENTENCE)))
    with fake:
        pictures = {"image": torch.empty((count, 3, *model.image_size), dtype=torch.uint8)}
        if model.hand_view is not None:
            size = model.hand_view.size
            pictures["hand_image"] = torch.empty((count, 3, size, size), dtype=torch.uint8)
    return {
        **pictures,
        "state": torch.zeros(count, int(model.config.get("state_dim", 4))),
        "instruction": sentence.expand(count, -1),
    }


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _left_as_it_was(model: VLAModel) -> Iterator[None]:
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    checkpointing = model.gradient_checkpointing
    try:
        yield
    finally:
        for parameter, trained in before:
            parameter.requires_grad_(trained)
        if model.gradient_checkpointing != checkpointing:
            model.set_gradient_checkpointing(checkpointing)


@contextmanager
def _full_prompts(model: VLAModel) -> Iterator[None]:
    """Prompts as long as they may be, without a tokenizer, which a plan needs not have at hand."""
    tokenize = getattr(model, "tokenize", None)
    name, length = "tokenize", model.prompt_length
    if isinstance(tokenize, PromptTokenizer):
        name, length = "tokenize", tokenize.length
    if length is None:
        yield
        return
    longest = length

    def full(prompts: Sequence[Any] | Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(prompts), longest)
        return torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.bool)

    own = vars(model).get(name)  # none where it is a method
    setattr(model, name, full)
    try:
        yield
    finally:
        if own is None:
            delattr(model, name)
        else:
            setattr(model, name, own)
