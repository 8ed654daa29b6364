"""pi0 (Black et al. 2024) and pi0.5 (Physical Intelligence 2025): PaliGemma with an action expert that denoises chunks.

Image and prompt make the prefix, which PaliGemma reads once per decision. The expert's tokens, the suffix, attend to
the prefix's keys and values and to one another, once per denoising step. pi0's suffix holds the state and, mixed into
each action, the flow time; pi0.5's time modulates the expert's norms instead, and its state is text in the prompt or
not there at all. Parameter names are openpi's, so published weights load by name.
Letters besides those of :mod:`sb3_vla.models.base`: C cameras, P prefix tokens, W width of PaliGemma, E of the expert.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mw_envs.tasks import decode_instruction, did_you_mean
from sb3_vla.common import batch_noise as draw
from sb3_vla.common.errors import InputError
from sb3_vla.common.paths import local_path
from sb3_vla.models.base import PERCEPTION, Context, VLAModel, is_perceived
from sb3_vla.models.compact import time_embedding
from sb3_vla.models.gemma import GemmaLayer, GemmaSize, GemmaTower, KeysValues, RMSNorm
from sb3_vla.models.normalization import CONVENTIONS, SCHEMES, STATISTICS, normalize, unnormalize
from sb3_vla.models.prompts import PromptTokenizer, clean, local_tokenizer_file, same_tokenizer
from sb3_vla.models.recomputing import recomputing
from sb3_vla.models.resizing import resize_bytes

PALIGEMMA = "google/paligemma-3b-pt-224"
#: the published ones, and rows of the token embedding
VLM_SIZE, EXPERT_SIZE, VOCABULARY = GemmaSize(2048, 16_384), GemmaSize(1024, 4096), 257_152
_STATE_BINS = 256
# Compiled towers see prompts padded to a multiple of this: few lengths are met, and each is compiled once.
_PROMPT_STEP = 16
# Towers, batch sizes and passes with and without a gradient are compiled apart; after eight torch compiles no more.
_COMPILATIONS = 64


@dataclass(frozen=True)
class VisionSize:
    """Sizes of the vision tower, SigLIP So400m/14 by default."""

    width: int = 1152
    depth: int = 27
    heads: int = 16
    mlp: int = 4304
    patch: int = 14


@dataclass
class _Conditions:
    """What the denoiser needs of an observation: the prefix's keys and values, which of its tokens are no padding
    (None for all), how many these are (N,), and the state, normalized and padded (N, padded_dim)."""

    keys_values: list[KeysValues]
    valid: Tensor | None
    length: Tensor
    state: Tensor


class Pi0(VLAModel):
    """pi0.

    :param action_dim: A, dimensions that act, the first of ``padded_dim``.
    :param action_horizon: H.
    :param state_dim: numbers of the state.
    :param image_size: side of the square image it reads.
    :param convention: ``openpi`` (and RLinf) or ``lerobot``: whose way of resizing images, keeping normalization from
        dividing by zero, writing prompts and averaging the imitation loss (openpi: over padded dimensions as well).
    :param state_scheme: how states are normalized, in :data:`sb3_vla.models.normalization.SCHEMES`; None for
        the variant's own.
    :param action_scheme: how actions are.
    :param tokenizer: where PaliGemma's tokenizer is, see :class:`sb3_vla.models.prompts.PromptTokenizer`.
    :param prompt_tokens: tokens of the prompt, longer ones are cut; None for the variant's own. What a rollout keeps of
        a frozen backbone grows with it.
    :param padded_dim: L, width of actions and states inside the model.
    :param vision: sizes of the vision tower that differ from the default.
    :param vlm: sizes of PaliGemma's language model that differ from the default.
    :param expert: sizes of the action expert that differ from the default.
    :param vocabulary: rows of the token embedding.
    """

    scheme = "mean_std"
    default_prompt_tokens = 48
    default_trainable = "expert"
    caches_perception = False

    def __init__(
        self,
        action_dim: int = 4,
        action_horizon: int = 5,
        state_dim: int = 4,
        image_size: int = 224,
        convention: str = "openpi",
        state_scheme: str | None = None,
        action_scheme: str | None = None,
        tokenizer: str = PALIGEMMA,
        prompt_tokens: int | None = None,
        padded_dim: int = 32,
        vision: Mapping[str, int] | None = None,
        vlm: Mapping[str, int] | None = None,
        expert: Mapping[str, int] | None = None,
        vocabulary: int = VOCABULARY,
    ) -> None:
        super().__init__(action_dim, action_horizon)
        self.compiled = False
        self.vision_size = VisionSize(**dict(vision or {}))
        vlm_size, expert_size = replace(VLM_SIZE, **dict(vlm or {})), replace(EXPERT_SIZE, **dict(expert or {}))
        self.config = {
            "action_dim": action_dim,
            "action_horizon": action_horizon,
            "state_dim": state_dim,
            "image_size": image_size,
            "convention": convention,
            "state_scheme": state_scheme or self.scheme,
            "action_scheme": action_scheme or self.scheme,
            "tokenizer": str(tokenizer),
            "prompt_tokens": prompt_tokens or self.default_prompt_tokens,
            "padded_dim": padded_dim,
            "vision": asdict(self.vision_size),
            "vlm": asdict(vlm_size),
            "expert": asdict(expert_size),
            "vocabulary": vocabulary,
        }
        self._check(vlm_size, expert_size)
        self.latent_dim, self.image_size = padded_dim, (image_size, image_size)
        self.convention = convention
        self.state_scheme, self.action_scheme = self.config["state_scheme"], self.config["action_scheme"]
        self.tokenize = PromptTokenizer(self.config["tokenizer"], self.config["prompt_tokens"])
        for name, size in (("state", state_dim), ("action", action_dim)):
            for statistic in STATISTICS:  # those of data that no scheme changes
                value = {"mean": 0.0, "min": -1.0, "q01": -1.0}.get(statistic, 1.0)
                self.register_buffer(f"{name}_{statistic}", torch.full((size,), value))
        self.paligemma_with_expert = nn.ModuleDict(
            {
                "paligemma": _nested(
                    "model",
                    vision_tower=nn.ModuleDict({"vision_model": _vision_model(self.vision_size, image_size)}),
                    multi_modal_projector=nn.ModuleDict({"linear": nn.Linear(self.vision_size.width, vlm_size.width)}),
                    language_model=GemmaTower(vlm_size, vocabulary),
                ),
                "gemma_expert": nn.ModuleDict(
                    {"model": GemmaTower(expert_size, None, self._condition_dim(expert_size))}
                ),
            }
        )
        self.action_in_proj = nn.Linear(padded_dim, expert_size.width)
        self.action_out_proj = nn.Linear(expert_size.width, padded_dim)
        self._build_suffix(expert_size.width, padded_dim)
        self.action_feature_dim = expert_size.width
        self.feature_dim = 2 * vlm_size.width + state_dim

    @property
    def vision_model(self) -> nn.Module:
        """SigLIP."""
        return self._paligemma["vision_tower"]["vision_model"]  # type: ignore[index, return-value]

    @property
    def language_model(self) -> GemmaTower:
        """PaliGemma's language model."""
        return self._paligemma["language_model"]  # type: ignore[return-value]

    @property
    def expert(self) -> GemmaTower:
        """The action expert."""
        return self.paligemma_with_expert["gemma_expert"]["model"]  # type: ignore[index, return-value]

    @property
    def _paligemma(self) -> nn.ModuleDict:
        return self.paligemma_with_expert["paligemma"]["model"]  # type: ignore[index, return-value]

    def backbone(self) -> Iterator[nn.Parameter]:
        """See :meth:`VLAModel.backbone`."""
        yield from self._paligemma.parameters()

    def halve_backbone(self) -> None:
        """See :meth:`VLAModel.halve_backbone`; norms of the language model, and embeddings of patches and positions,
        stay float32, as openpi keeps them."""
        if any(p.requires_grad for name, p in self._paligemma.named_parameters() if ".lora_" not in name):
            raise InputError('frozen_bf16=True is for a frozen backbone; use trainable="expert", "adaptive" or "lora"')
        kept = {id(part.weight) for part in self.modules() if isinstance(part, RMSNorm)}
        kept |= {id(parameter) for parameter in self.vision_model.embeddings.parameters()}  # type: ignore[union-attr]
        for parameter in self.backbone():
            if not parameter.requires_grad and id(parameter) not in kept:
                parameter.data = parameter.data.to(torch.bfloat16)

    def compile_towers(self, options: Mapping[str, Any]) -> None:
        """See :meth:`VLAModel.compile_towers`; each shape is compiled for itself, unless ``dynamic`` says otherwise.

        To be called when it is settled what is trained.
        """
        from torch._dynamo import config  # a heavy import, needed by few

        config.recompile_limit = max(config.recompile_limit, _COMPILATIONS)
        for tower in (self.vision_model, self.language_model, self.expert):
            tower.compile(**{"dynamic": False, **options})
            for parameter in tower.parameters():
                if parameter.requires_grad:
                    # A replayed graph overwrites the gradients that it gave, and those of micro batches add up.
                    parameter.register_hook(torch.clone)
        self.compiled = True

    def _shown_tokens(self, used: int) -> int:
        """How many tokens the towers are given, of which ``used`` are no padding in the longest prompt."""
        if not self.compiled:
            return used
        longest: int = self.config["prompt_tokens"]
        return min(-(-used // _PROMPT_STEP) * _PROMPT_STEP, longest)

    def fit_image(self, image: Tensor) -> Tensor:
        """See :meth:`VLAModel.fit_image`; LeRobot's way gives no whole numbers, so the image is kept as it came."""
        return image if self.convention == "lerobot" else resize_with_pad(image, self.image_size[0], antialias=True)

    @staticmethod
    def is_same_option(name: str, one: Any, other: Any) -> bool:
        """See :meth:`VLAModel.is_same_option`; a checkpoint has its own copy of the tokenizer."""
        return bool(one == other) or (name == "tokenizer" and same_tokenizer(one, other))

    @staticmethod
    def with_full_paths(options: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`VLAModel.with_full_paths`."""
        paths = {key: local_path(options[key]) for key in ("tokenizer", "norm_stats") if options.get(key)}
        return {**options, **{key: str(path.resolve()) for key, path in paths.items() if path.exists()}}

    def local_tokenizer(self) -> Path | None:
        """See :meth:`VLAModel.local_tokenizer`."""
        return local_tokenizer_file(self.tokenize.source)

    def encode(self, observation: dict[str, Tensor]) -> Context:
        """See :meth:`VLAModel.encode`; what is not kept needs no room for longer prompts."""
        if is_perceived(observation):
            return self.contextualize(observation)
        perception, padded = self._look(observation)
        return self._conditioned(perception, padded)

    def perceive(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`VLAModel.perceive`; what it gives has room for the longest prompt."""
        perception, _ = self._look(observation)
        keys_values, valid = PERCEPTION + "keys_values", PERCEPTION + "valid"
        room = self._patches + self.config["prompt_tokens"] - perception[valid].shape[1]
        return {
            **perception,
            keys_values: F.pad(perception[keys_values], (0, 0, 0, room)),
            valid: F.pad(perception[valid], (0, room)),
        }

    def contextualize(self, perception: dict[str, Tensor]) -> Context:
        """See :meth:`VLAModel.contextualize`; the room that no prompt of the batch needs is left out."""
        keys_values, valid = perception[PERCEPTION + "keys_values"], perception[PERCEPTION + "valid"]
        pictured = self._patches
        shortest, longest = torch.stack(torch.aminmax(valid.sum(1))).tolist()
        used = pictured + self._shown_tokens(longest - pictured)
        shown = {PERCEPTION + "keys_values": keys_values[..., :used, :], PERCEPTION + "valid": valid[:, :used]}
        return self._conditioned({**perception, **shown}, padded=shortest < used)

    @property
    def _patches(self) -> int:
        """Tokens of the image."""
        side: int = self.image_size[0] // self.vision_size.patch
        return side * side

    def _look(self, observation: dict[str, Tensor]) -> tuple[dict[str, Tensor], bool]:
        """What :meth:`perceive` gives, without room, and whether some of its tokens are padding."""
        images = self.read_image(observation["image"])[:, None]
        tokens, valid, padded = self._shown_prompt(observation)
        tokens, valid = tokens.to(images.device), valid.to(images.device)
        hidden, keys_values, prefix_valid = self.run_prefix(images, tokens, valid, padded=padded)
        pictured = self._patches
        seen, read = hidden[:, :pictured].float().mean(1), _masked_mean(hidden[:, pictured:].float(), valid)
        perception = {
            # (N, layers, 2, kv_heads, P, head_dim)
            PERCEPTION + "keys_values": torch.stack([torch.stack(pair, dim=1) for pair in keys_values], dim=1),
            PERCEPTION + "valid": prefix_valid,
            PERCEPTION + "summary": torch.cat([seen, read], dim=1),
            "state": observation["state"],
        }
        return perception, padded

    def _conditioned(self, perception: dict[str, Tensor], padded: bool) -> Context:
        """A context from keys and values of which some belong to padding, or none."""
        valid = perception[PERCEPTION + "valid"]
        keys_values = [(pair[:, 0], pair[:, 1]) for pair in perception[PERCEPTION + "keys_values"].unbind(1)]
        state = self.normalize_state(perception["state"].float())
        widened = F.pad(state, (0, self.latent_dim - state.shape[1]))
        features = torch.cat([perception[PERCEPTION + "summary"], state], dim=1)
        return Context(features, _Conditions(keys_values, valid if padded else None, valid.sum(1), widened))

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """See :meth:`VLAModel.denoise`."""
        return self.denoise_features(context, x, t)[0]

    def denoise_features(self, context: Context, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`VLAModel.denoise_features`."""
        conditions: _Conditions = context.state
        repeats = len(x) // len(conditions.state)
        keys_values, valid, length, state = (
            conditions.keys_values,
            conditions.valid,
            conditions.length,
            conditions.state,
        )
        if repeats > 1:
            keys_values = [(k.repeat(repeats, 1, 1, 1), v.repeat(repeats, 1, 1, 1)) for k, v in keys_values]
            valid = None if valid is None else valid.repeat(repeats, 1)
            length, state = length.repeat(repeats), state.repeat(repeats, 1)
        with torch.autocast(x.device.type, enabled=False):  # these few layers are float32 in all implementations
            suffix, condition = self.embed_suffix(state, x, t)
        positions = length[:, None] + torch.arange(suffix.shape[1], device=x.device)
        mask = self._suffix_mask(suffix.shape[1], keys_values[0][0].shape[2], valid, x.device)
        hidden, _ = self.expert(suffix, positions, mask, keys_values, condition)
        hidden = hidden[:, -self.action_horizon :].float()
        with torch.autocast(x.device.type, enabled=False):
            return self.action_out_proj(hidden), hidden

    def read_image(self, image: Tensor) -> Tensor:
        """Images uint8 (N, 3, height, width) as SigLIP sees them, float32 (N, 3, S, S) in [-1, 1]."""
        if self.convention == "openpi":
            return resize_with_pad(image, self.image_size[0], antialias=True).float() / 255.0 * 2.0 - 1.0
        return resize_with_pad(image.float() / 255.0, self.image_size[0], antialias=False) * 2.0 - 1.0

    def read_prompt(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Tokens of the prompts, see :class:`sb3_vla.models.prompts.PromptTokenizer`, on the observation's device.

        :raises ValueError: if the tokenizer is one of a larger vocabulary.
        """
        tokens, valid = self._tokens(observation)
        device = observation["instruction"].device
        return tokens.to(device), valid.to(device)

    def _tokens(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """:meth:`read_prompt` in the machine's own memory."""
        instruction = observation["instruction"].cpu().numpy()
        prompts = self.prompts([decode_instruction(row) for row in instruction], observation["state"])
        tokens, valid = self.tokenize(prompts)
        if int(tokens.max()) >= self.config["vocabulary"]:
            raise InputError(
                f"The tokenizer {self.tokenize.source!r} gives token {int(tokens.max())}; the model knows "
                f"{self.config['vocabulary']}. It takes PaliGemma's tokenizer."
            )
        return tokens, valid

    def _shown_prompt(self, observation: dict[str, Tensor]) -> tuple[Tensor, Tensor, bool]:
        """Tokens that the towers are given, which of them are no padding, and whether some are.

        In the machine's own memory, where to ask for a number makes nobody wait for the device.
        """
        tokens, valid = self._tokens(observation)
        used = self._shown_tokens(int(valid.sum(1).max()))
        tokens, valid = tokens[:, :used], valid[:, :used]
        return tokens, valid, not bool(valid.all())

    def prompts(self, sentences: list[str], state: Tensor) -> list[tuple[str, ...]]:
        """The parts of each prompt, which are tokenized one by one."""
        if self.convention == "openpi":
            return [(clean(sentence), "\n") for sentence in sentences]
        return [(sentence if sentence.endswith("\n") else sentence + "\n",) for sentence in sentences]

    def embed_prefix(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Embeddings (N, P, W) of images (N, C, 3, S, S) in [-1, 1], then of tokens (N, T)."""
        kind = self.vision_model.embeddings.patch_embedding.weight.dtype  # type: ignore[union-attr]
        seen = self.vision_model(pixel_values=images.flatten(0, 1).to(kind)).last_hidden_state  # type: ignore[arg-type]
        pictured = self._paligemma["multi_modal_projector"]["linear"](seen)  # type: ignore[index]
        pictured = pictured.unflatten(0, images.shape[:2]).flatten(1, 2)
        words = self.language_model.embed_tokens(tokens) * math.sqrt(self.language_model.size.width)
        return torch.cat([pictured, words.to(pictured.dtype)], dim=1)

    def run_prefix(
        self,
        images: Tensor,
        tokens: Tensor,
        token_valid: Tensor,
        image_valid: Tensor | None = None,
        padded: bool | None = None,
    ) -> tuple[Tensor, list[KeysValues], Tensor]:
        """Run PaliGemma.

        :param images: (N, C, 3, S, S) in [-1, 1].
        :param tokens: int64 (N, T).
        :param token_valid: which tokens are no padding, bool (N, T).
        :param image_valid: which cameras are there, bool (N, C); None for all. One that is not there has no effect.
        :param padded: whether some token is not valid; None to look, which waits for the device.
        :return: final hidden states (N, P, W), keys and values of the layers, which tokens are valid, bool (N, P).
        """
        x = self.embed_prefix(images, tokens)
        patches = (x.shape[1] - tokens.shape[1]) // images.shape[1]
        if image_valid is None:
            image_valid = token_valid.new_ones(images.shape[:2])
        valid = torch.cat([image_valid.repeat_interleave(patches, dim=1), token_valid], dim=1)
        positions = (valid.cumsum(1) - 1).clamp(min=0)
        if padded is None:
            padded = not bool(valid.all())
        mask = valid[:, None, None, :] if padded else None  # a padding query sees what is valid, too
        hidden, keys_values = self.language_model(x, positions, mask)
        return hidden, keys_values, valid

    def embed_suffix(self, state: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Suffix tokens (N, 1 + H, E): the state, then each action with the time mixed in; and no condition."""
        time = time_embedding(t, self.expert.size.width)[:, None].expand(-1, x.shape[1], -1)
        mixed = self.action_time_mlp_in(torch.cat([self.action_in_proj(x), time], dim=2))
        return torch.cat([self.state_proj(state)[:, None], self.action_time_mlp_out(F.silu(mixed))], dim=1), None

    def normalize_state(self, state: Tensor) -> Tensor:
        """The environment's units to the model's."""
        return normalize(state, self._statistics("state"), self.state_scheme, self.convention)

    def normalize_action(self, action: Tensor) -> Tensor:
        """See :meth:`VLAModel.normalize_action`."""
        return normalize(action, self._statistics("action"), self.action_scheme, self.convention)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        """See :meth:`VLAModel.unnormalize_action`."""
        return unnormalize(action, self._statistics("action"), self.action_scheme, self.convention)

    def sharding_units(self) -> Iterator[nn.Module]:
        """See :meth:`VLAModel.sharding_units`."""
        yield from (part for part in self.modules() if isinstance(part, GemmaLayer))

    def imitation_loss(
        self, observation: dict[str, Tensor], actions: Tensor, mask: Tensor, *, draws: int = 1
    ) -> Tensor:
        """See :meth:`VLAModel.imitation_loss`; openpi also wants the padded dimensions to go to zero."""
        context = self.encode(observation)
        x0 = F.pad(self.normalize_action(actions), (0, self.latent_dim - self.action_dim)).repeat(draws, 1, 1)
        noise = draw.normal(x0.shape, device=x0.device)
        t = self.sample_time(len(x0), x0.device)
        error = (self.denoise(context, torch.lerp(x0, noise, t[:, None, None]), t) - (noise - x0)).square()
        if self.convention == "lerobot":
            error = error[:, :, : self.action_dim]
        weight = mask.to(error.dtype).repeat(draws, 1)
        return (error.mean(dim=2) * weight).sum() / weight.sum()

    def sample_time(self, count: int, device: torch.device) -> Tensor:
        """0.999 Beta(1.5, 1) + 0.001, (count,), by its inverse distribution function: more of the noisy times."""
        uniform = draw.uniform((count,), device=device)
        return 0.999 * uniform ** (1 / 1.5) + 0.001

    def _statistics(self, name: str) -> dict[str, Tensor]:
        return {statistic: getattr(self, f"{name}_{statistic}") for statistic in STATISTICS}

    def _build_suffix(self, width: int, padded_dim: int) -> None:
        self.state_proj = nn.Linear(padded_dim, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)

    def _condition_dim(self, expert: GemmaSize) -> int | None:
        return None

    def _suffix_mask(self, suffix: int, prefix: int, valid: Tensor | None, device: torch.device) -> Tensor | None:
        """The state's token sees no action; every token sees the prefix; bool (N or 1, 1, suffix, prefix + suffix)."""
        own = torch.ones(suffix, suffix, dtype=torch.bool, device=device)
        own[0, 1:] = False
        seen = own.new_ones(1, prefix) if valid is None else valid
        seen = seen[:, None, None].expand(-1, 1, suffix, -1)
        return torch.cat([seen, own.expand(len(seen), 1, -1, -1)], dim=3)

    def _check(self, vlm: GemmaSize, expert: GemmaSize) -> None:
        config, name = self.config, type(self).__name__
        for option, known in (("convention", CONVENTIONS), ("state_scheme", SCHEMES), ("action_scheme", SCHEMES)):
            if config[option] not in known:
                raise InputError(f"Unknown {option}={config[option]!r}; {did_you_mean(config[option], known)}")
        if config["image_size"] % self.vision_size.patch:
            raise InputError(
                f"{name} image_size={config['image_size']}; expected a multiple of {self.vision_size.patch}, "
                f"such as {16 * self.vision_size.patch}"
            )
        if max(config["action_dim"], config["state_dim"]) > config["padded_dim"]:
            raise InputError(
                f"{name} padded_dim={config['padded_dim']}; expected at least action_dim={config['action_dim']} and "
                f"state_dim={config['state_dim']}"
            )
        shared = ("depth", "heads", "kv_heads", "head_dim")
        if any(getattr(vlm, size) != getattr(expert, size) for size in shared):
            raise InputError(
                f"{name} vlm={vlm} and expert={expert}; they share attention, so {', '.join(shared)} agree"
            )


class Pi05(Pi0):
    """pi0.5.

    Parameters as of :class:`Pi0`, and

    :param discrete_state_input: whether the prompt tells the state in 256 steps; if not, as in RLinf's MetaWorld
        models, the model does not know the state.
    :param prompt_state_dim: numbers of the state in the prompt, zeros behind the real ones: LeRobot 0.4 wrote 32; None
        for the real ones.
    """

    scheme = "quantiles"
    default_prompt_tokens = 200

    def __init__(self, discrete_state_input: bool = True, prompt_state_dim: int | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.config |= {"discrete_state_input": discrete_state_input, "prompt_state_dim": prompt_state_dim}
        self.discrete_state_input, self.prompt_state_dim = discrete_state_input, prompt_state_dim

    def prompts(self, sentences: list[str], state: Tensor) -> list[tuple[str, ...]]:
        """See :meth:`Pi0.prompts`."""
        if not self.discrete_state_input:
            return super().prompts(sentences, state)
        state = self.normalize_state(state.float())
        state = F.pad(state, (0, (self.prompt_state_dim or state.shape[1]) - state.shape[1]))
        edges = torch.linspace(-1, 1, _STATE_BINS + 1, dtype=torch.float64, device=state.device)[:-1]
        bins = torch.bucketize(state.double(), edges, right=True) - 1  # below the first edge it is -1
        return [
            (f"Task: {clean(sentence)}, State: {' '.join(map(str, row))};\nAction: ",)
            for sentence, row in zip(sentences, bins.tolist(), strict=True)
        ]

    def embed_suffix(self, state: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """Suffix tokens (N, H, E), one an action, and the condition of the norms (N, E), made of the time."""
        time = self.time_mlp_in(time_embedding(t, self.expert.size.width))
        return self.action_in_proj(x), F.silu(self.time_mlp_out(F.silu(time)))

    def adaptive_parameters(self) -> Iterator[nn.Parameter]:
        """The time's perceptron and what it modulates the norms by."""
        for name, parameter in self.named_parameters():
            if name.startswith("time_mlp") or ".dense." in name:
                yield parameter

    def _build_suffix(self, width: int, padded_dim: int) -> None:
        self.time_mlp_in = nn.Linear(width, width)
        self.time_mlp_out = nn.Linear(width, width)

    def _condition_dim(self, expert: GemmaSize) -> int | None:
        return expert.width

    def _suffix_mask(self, suffix: int, prefix: int, valid: Tensor | None, device: torch.device) -> Tensor | None:
        """Every token sees everything but padding."""
        return None if valid is None else F.pad(valid, (0, suffix), value=True)[:, None, None]


def resize_with_pad(image: Tensor, size: int, *, antialias: bool) -> Tensor:
    """Fit an image into a square, keeping its proportions, black around it; same type.

    With ``antialias`` it equals PIL's bilinear resize, as openpi has it; without it is LeRobot's.

    :param image: (N, 3, height, width), uint8 with ``antialias``, else float32 in [0, 1].
    """
    height, width = image.shape[2:]
    if (height, width) == (size, size):
        return image
    ratio = max(height, width) / size
    fitted = (int(height / ratio), int(width / ratio))
    if antialias:
        image = resize_bytes(image, fitted)
    else:
        image = F.interpolate(image, fitted, mode="bilinear")
    top, left = (size - fitted[0]) // 2, (size - fitted[1]) // 2
    return F.pad(image, (left, size - fitted[1] - left, top, size - fitted[0] - top))


def _masked_mean(x: Tensor, valid: Tensor) -> Tensor:
    weight = valid[:, :, None].to(x.dtype)
    return (x * weight).sum(1) / weight.sum(1)


def _nested(name: str, **modules: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict({name: nn.ModuleDict(modules)})


def _vision_model(size: VisionSize, image_size: int) -> nn.Module:
    # A heavy import, which those who use other models are spared.
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=size.width,
            intermediate_size=size.mlp,
            num_hidden_layers=size.depth,
            num_attention_heads=size.heads,
            image_size=image_size,
            patch_size=size.patch,
            hidden_act="gelu_pytorch_tanh",
            layer_norm_eps=1e-6,
            vision_use_head=False,
        )
    )
    model = getattr(model, "vision_model", model)  # before transformers 5.6 it was one level deeper
    recomputing(model.encoder.layers)
    model.encoder.register_forward_pre_hook(_in_own_precision, with_kwargs=True)
    return model


def _in_own_precision(encoder: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, Any]:
    """Embedded patches in the precision of the layers, where it is not that of the embeddings."""
    kind = encoder.layers[0].layer_norm1.weight.dtype  # type: ignore[union-attr, index]
    if given:
        return (given[0].to(kind), *given[1:]), named
    return given, {**named, "inputs_embeds": named["inputs_embeds"].to(kind)}
