"""OpenVLA-OFT (Kim et al. 2025) with action tokens: all numbers of a chunk decoded in one pass of a language model.

Two vision towers look at the image, DINOv2 and SigLIP; their patches side by side, projected, are tokens of a Llama
between the first token and the rest of the prompt. Empty tokens follow, one for each number of the chunk. Attention is
bidirectional, so each token sees all that are there, and the number's logits are read one place before its token.
An action token is one of the last 256 of the vocabulary; the other ones' logits are left out, as in RLinf.

Letters besides those of :mod:`sb3_vla.models.base`: P patches, T tokens of the padded prompt, D numbers of an action as
the model has it, of which A act, W width of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sb3_vla.common.errors import InputError
from sb3_vla.models.base import PERCEPTION, Context, VLAModel, sizes_of
from sb3_vla.models.recomputing import Recomputing, recomputing
from sb3_vla.models.tokenizing import InstructionTokenizer, byte_tokenizer

BINS = 256
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
START, STOP = 1, 2
PROMPT = "In: What action should the robot take to {}?\nOut:"
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_MOMENTS = ("action_mean", "action_std", "state_mean", "state_std")


@dataclass(frozen=True)
class OFTSizes:
    """Sizes of an OpenVLA-OFT.

    :param width: W.
    :param ffn: hidden width of the Llama's perceptrons.
    :param layers: its depth.
    :param heads: its query heads.
    :param kv_heads: its key and value heads.
    :param vocabulary: rows of its embedding.
    :param unused: how many of them, the last ones, are no token.
    :param norm_eps: of its RMS norms.
    :param rope_base: of its rotary embedding.
    :param pad_id: of the prompt's padding.
    :param prompt_end_id: of the space that ends the prompt.
    :param patch_size: side of a patch.
    :param vision_widths: of DINOv2 and SigLIP.
    :param vision_layers: their depths; the last block is not used.
    :param vision_heads: their heads.
    :param vision_ffns: hidden widths of their perceptrons.
    """

    width: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    vision_widths: tuple[int, int]
    vision_layers: tuple[int, int]
    vision_heads: tuple[int, int]
    vision_ffns: tuple[int, int]
    unused: int = 64
    norm_eps: float = 1e-6
    rope_base: float = 10_000.0
    pad_id: int = 32000
    prompt_end_id: int = 29871
    patch_size: int = 14


#: the published one, and one for a laptop, which reads bytes and trains from scratch
OFT_SIZES = {
    "7B": OFTSizes(4096, 11008, 32, 32, 32, 32064, (1024, 1152), (24, 27), (16, 16), (4096, 4304)),
    "laptop": OFTSizes(
        128, 384, 3, 4, 4, 576, (96, 96), (3, 3), (3, 3), (192, 192), unused=0, pad_id=0, prompt_end_id=260
    ),
}


class OpenVLAOFT(VLAModel):
    """OpenVLA-OFT of any size, with discrete actions.

    Actions are scaled so that ``action_q01`` and ``action_q99`` are at -1 and 1 where ``action_scaled`` says so; these
    statistics are at -1 and 1 themselves, the limits of the environment's actions, until a checkpoint sets them.

    :param action_dim: A.
    :param action_horizon: H.
    :param state_dim: of the proprioceptive state, which is not read.
    :param image_size: side of the square images that it is given; it resizes them itself.
    :param resolution: side of the square that the towers read.
    :param sizes: a name in :data:`OFT_SIZES`, or the sizes.
    :param acting: which of the model's D numbers act, A places; None for all, so that D is A. Seven numbers are usual,
        of which the environment takes ``(0, 1, 2, 6)``.
    :param numbers: D; None for A.
    :param tokenizer: contents of a ``tokenizer.json`` whose texts begin with token 1; None for a token for each byte.
    :param max_prompt_tokens: T.
    :param stop_token: whether the end of the text follows the action, as in openvla-oft; RLinf leaves it out.
    :param precision: of the weights, ``float32`` or ``bfloat16``.
    :raises ValueError: for sizes that do not fit each other.
    """

    prediction = "tokens"
    action_q01: Tensor
    action_q99: Tensor
    action_scaled: Tensor
    prompt_length: int

    def __init__(
        self,
        action_dim: int = 4,
        action_horizon: int = 1,
        state_dim: int = 4,
        image_size: int = 480,
        resolution: int = 224,
        sizes: str | Mapping[str, Any] = "7B",
        acting: Sequence[int] | None = None,
        numbers: int | None = None,
        tokenizer: str | None = None,
        max_prompt_tokens: int = 50,
        stop_token: bool = False,
        precision: str = "float32",
    ) -> None:
        super().__init__(action_dim, action_horizon)
        if precision not in PRECISIONS:
            raise InputError(f"OpenVLAOFT precision={precision!r}; expected {' or '.join(PRECISIONS)}")
        self.sizes = sizes_of("OpenVLAOFT", "sizes", sizes, OFT_SIZES, OFTSizes)
        self.numbers = numbers or action_dim
        self.acting = list(range(action_dim) if acting is None else acting)
        self.config = {
            "action_dim": action_dim,
            "action_horizon": action_horizon,
            "state_dim": state_dim,
            "image_size": image_size,
            "resolution": resolution,
            "sizes": sizes if isinstance(sizes, str) else asdict(self.sizes),
            "acting": None if acting is None else self.acting,
            "numbers": numbers,
            "tokenizer": tokenizer,
            "max_prompt_tokens": max_prompt_tokens,
            "stop_token": stop_token,
            "precision": precision,
        }
        if len(set(self.acting)) != action_dim or not set(self.acting) <= set(range(self.numbers)):
            raise InputError(
                f"OpenVLAOFT acting={self.acting} of {self.numbers} numbers; expected {action_dim} different places"
            )
        if resolution < 1 or resolution % self.sizes.patch_size:
            raise InputError(f"OpenVLAOFT resolution={resolution}; expected a multiple of {self.sizes.patch_size}")
        self.image_size, self.resolution = (image_size, image_size), resolution
        self.prompt_length, self.stop_token = max_prompt_tokens, stop_token
        self.first_action_id = self.sizes.vocabulary - self.sizes.unused - BINS
        self.tokenizer = InstructionTokenizer(
            byte_tokenizer(SPECIAL_TOKENS, "<s>") if tokenizer is None else tokenizer, PROMPT, None, lower=True
        )
        if self.tokenizer.size > self.sizes.vocabulary or self.sizes.prompt_end_id >= self.first_action_id:
            raise InputError(
                f"The tokenizer has {self.tokenizer.size} tokens, the model {self.sizes.vocabulary}, of which those "
                f"from {self.first_action_id} on are actions; use the tokenizer that the model was published with"
            )
        self.register_buffer("token_values", openvla_token_values(BINS), persistent=False)
        self.register_buffer("action_q01", -torch.ones(self.numbers))
        self.register_buffer("action_q99", torch.ones(self.numbers))
        self.register_buffer("action_scaled", torch.ones(self.numbers, dtype=torch.bool))
        self.vision_backbone = VisionBackbone(self.sizes, resolution)
        self.projector = Projector(sum(self.sizes.vision_widths), self.sizes.width)
        self.language_model: Any = _llama(self.sizes)
        self.feature_dim = self.sizes.width
        for part in (self.vision_backbone, self.projector, self.language_model):
            part.to(PRECISIONS[precision])

    def backbone(self) -> Iterator[nn.Parameter]:
        """The vision towers and their projection; see :meth:`VLAModel.backbone`."""
        yield from self.vision_backbone.parameters()
        yield from self.projector.parameters()

    def perceive(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`VLAModel.perceive`."""
        tokens, mask = self.tokenize(observation["instruction"])
        dtype = self.projector.fc1.weight.dtype
        patches = self.projector(self.vision_backbone(self.normalize_image(observation["image"]).to(dtype)))
        return {PERCEPTION + "patches": patches, PERCEPTION + "tokens": tokens, PERCEPTION + "mask": mask}

    def contextualize(self, perception: dict[str, Tensor]) -> Context:
        """See :meth:`VLAModel.contextualize`."""
        tokens, mask, patches = (perception[PERCEPTION + name] for name in ("tokens", "mask", "patches"))
        embedded, mask = self.embed(tokens, mask, patches)
        hidden = self.read(embedded, mask)
        first = patches.shape[1] + tokens.shape[1] - 1
        return Context(hidden[:, first].float(), hidden[:, first:])

    def embed(self, tokens: Tensor, mask: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """The sequence, (N, P + T + H D or one more, W), and which of its tokens are there."""
        words = self.language_model.get_input_embeddings()(tokens)
        empty = words.new_zeros(len(words), self.action_horizon * self.numbers, words.shape[2])
        parts = [words[:, :1], patches.to(words.dtype), words[:, 1:], empty]
        if self.stop_token:
            stop = torch.full_like(tokens[:, :1], STOP)
            parts.append(self.language_model.get_input_embeddings()(stop))
        there = F.pad(mask[:, 1:], (1 + patches.shape[1], empty.shape[1] + self.stop_token), value=True)
        return torch.cat(parts, dim=1), there

    def read(self, embedded: Tensor, mask: Tensor) -> Tensor:
        """The language model's last hidden states; every token sees every one that is there."""
        hidden_from = torch.zeros(mask.shape, dtype=embedded.dtype, device=mask.device)
        hidden_from = hidden_from.masked_fill(~mask, torch.finfo(embedded.dtype).min)[:, None, None]
        return self.language_model.model(
            inputs_embeds=embedded,
            attention_mask=hidden_from.expand(-1, -1, mask.shape[1], -1),
            position_ids=mask.cumsum(1) - 1,
            use_cache=False,
        ).last_hidden_state

    def token_logits(self, context: Context) -> Tensor:
        """See :meth:`VLAModel.token_logits`; tokens by ascending id, smallest actions last."""
        hidden = context.state[:, : self.action_horizon * self.numbers]
        hidden = hidden.unflatten(1, (self.action_horizon, self.numbers))[:, :, self.acting]
        # By the layer itself, which may have an adapter; the other tokens' logits are little work beside the rest.
        logits = self.language_model.lm_head(hidden)
        return logits[..., self.first_action_id : self.first_action_id + BINS].float()

    def normalize_image(self, image: Tensor) -> Tensor:
        """Images uint8 (N, 3, h, w) as both towers read them, float32 (N, 6, resolution, resolution)."""
        image = F.interpolate(image.float(), (self.resolution,) * 2, mode="bicubic", antialias=True)
        image = image.clamp(0, 255).round() / 255
        mean, std = image.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, :, None, None]
        return torch.cat([(image - mean) / std, (image - 0.5) / 0.5], dim=1)

    def tokenize(self, instruction: Tensor) -> tuple[Tensor, Tensor]:
        """Prompts of uint8 (N, L): ids, int64 (N, T), and which are no padding; that is behind the first token.

        :raises ValueError: for a prompt longer than T.
        """
        rows = []
        for ids in self.tokenizer(instruction):
            if ids[0] != START:
                raise InputError(f"The tokenizer begins texts with token {ids[0]}; OpenVLA's begins them with {START}")
            missing = self.prompt_length - len(ids) - 1
            if missing < 0:
                raise InputError(
                    f"A prompt has {len(ids) + 1} tokens; the model is made for max_prompt_tokens={self.prompt_length}"
                )
            rows.append([START, *[self.sizes.pad_id] * missing, *ids[1:], self.sizes.prompt_end_id])
        tokens = torch.tensor(rows, device=instruction.device)
        lengths = torch.tensor([len(ids) for ids in self.tokenizer(instruction)], device=instruction.device)
        place = torch.arange(self.prompt_length, device=instruction.device)
        return tokens, (place == 0) | (place >= self.prompt_length - lengths[:, None])

    def set_statistics(self, statistics: dict[str, Tensor]) -> None:
        """See :meth:`VLAModel.set_statistics`; of ``action_q01``, ``action_q99``, ``action_scaled``, each (D,).

        Bounds may be those of the numbers that act, (A,). Means and deviations, by which it scales nothing, are passed
        over.
        """
        bounds = {}
        for name, value in statistics.items():
            if name in _MOMENTS:
                continue
            if name in ("action_q01", "action_q99") and value.shape == (self.action_dim,) != (self.numbers,):
                value, acting = getattr(self, name).clone(), value
                value[self.acting] = acting.to(value)
            bounds[name] = value
        super().set_statistics(bounds)

    def normalize_action(self, action: Tensor) -> Tensor:
        """See :meth:`VLAModel.normalize_action`."""
        low, high, scaled = self._bounds()
        return torch.where(scaled, 2 * (action - low) / (high - low + 1e-8) - 1, action)

    def unnormalize_action(self, action: Tensor) -> Tensor:
        """See :meth:`VLAModel.unnormalize_action`."""
        low, high, scaled = self._bounds()
        return torch.where(scaled, 0.5 * (action + 1) * (high - low + 1e-8) + low, action)

    def action_tokens(self, actions: Tensor) -> Tensor:
        """Tokens, int64 (N, H, D) in 0..255 by ascending id, of actions (N, H, A) in environment units.

        A number that does not act is in the middle of its range.
        """
        normalized = actions.new_zeros(*actions.shape[:2], self.numbers)
        normalized[..., self.acting] = self.normalize_action(actions).clamp(-1, 1)
        edges = torch.linspace(-1, 1, BINS, dtype=torch.float64, device=actions.device)
        return BINS - torch.bucketize(normalized.double(), edges, right=True)

    def sharding_units(self) -> Iterator[nn.Module]:
        """See :meth:`VLAModel.sharding_units`."""
        yield from self.language_model.model.layers
        yield from (part for part in self.vision_backbone.modules() if isinstance(part, VisionBlock))

    def imitation_loss(
        self, observation: dict[str, Tensor], actions: Tensor, mask: Tensor, *, draws: int = 1
    ) -> Tensor:
        """Cross-entropy of the action tokens, and of the stop token where there is one, among the whole vocabulary.

        :param actions: expert chunks in environment units, float32 (N, H, A).
        :param mask: which steps are within the episode, bool (N, H).
        :param draws: of no effect, because nothing is drawn.
        """
        return self.token_loss(self.encode(observation), self.action_tokens(actions), mask)

    def imitation_weight(self, mask: Tensor) -> float:
        """See :meth:`VLAModel.imitation_weight`."""
        return mask.sum().item() * self.numbers + self.stop_token * len(mask)

    def token_loss(self, context: Context, tokens: Tensor, mask: Tensor) -> Tensor:
        """Mean cross-entropy of tokens (N, H, D), 0..255, where the mask (N, H) says so, a scalar."""
        targets = (tokens + self.first_action_id).flatten(1)
        weight = mask.repeat_interleave(self.numbers, dim=1).float()
        if self.stop_token:
            targets, weight = F.pad(targets, (0, 1), value=STOP), F.pad(weight, (0, 1), value=1.0)
        logits = self.language_model.lm_head(context.state[:, : targets.shape[1]]).float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return (loss * weight.flatten()).sum() / weight.sum()

    def _bounds(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.action_q01[self.acting], self.action_q99[self.acting], self.action_scaled[self.acting]


class VisionBackbone(nn.Module):
    """Two towers on the six channels of :meth:`OpenVLAOFT.normalize_image`: patches side by side, (N, P, widths)."""

    def __init__(self, sizes: OFTSizes, resolution: int) -> None:
        super().__init__()
        towers = [
            VisionTower(width, layers, heads, ffn, sizes.patch_size, resolution, dino=dino)
            for width, layers, heads, ffn, dino in zip(
                sizes.vision_widths,
                sizes.vision_layers,
                sizes.vision_heads,
                sizes.vision_ffns,
                (True, False),
                strict=True,
            )
        ]
        self.featurizer, self.fused_featurizer = towers

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([self.featurizer(image[:, :3]), self.fused_featurizer(image[:, 3:])], dim=2)


class VisionTower(nn.Module):
    """A vision transformer with the names of timm's weights, up to its last block but one, without a norm after it.

    :param dino: with class and register tokens and scaled residuals (DINOv2), or with an unused pooling (SigLIP).
    """

    def __init__(
        self, width: int, layers: int, heads: int, ffn: int, patch_size: int, resolution: int, *, dino: bool
    ) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width)) if dino else None
        self.reg_token = nn.Parameter(torch.zeros(1, 4, width)) if dino else None
        self.pos_embed = nn.Parameter(torch.randn(1, (resolution // patch_size) ** 2, width) * 0.02)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch_size, patch_size)})
        self.blocks = nn.ModuleList(VisionBlock(width, heads, ffn, scaled=dino) for _ in range(layers))
        # Of no use here, but published checkpoints have them.
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.attn_pool = None if dino else AttentionPool(width, ffn)
        for unused in (self.blocks[-1], self.norm, self.attn_pool):
            if unused is not None:
                unused.requires_grad_(False)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed["proj"](image).flatten(2).transpose(1, 2) + self.pos_embed
        extra = 0
        if self.cls_token is not None and self.reg_token is not None:
            first = torch.cat([self.cls_token, self.reg_token], dim=1)
            extra = first.shape[1]
            x = torch.cat([first.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks[:-1]:  # type: ignore[index]
            x = block(x)
        return x[:, extra:]


class VisionBlock(Recomputing):
    """Attention and perceptron, each behind a norm; scaled by channel if wanted (LayerScale, Touvron et al. 2021)."""

    def __init__(self, width: int, heads: int, ffn: int, scaled: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.ls1 = ChannelScale(width) if scaled else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, ffn), "fc2": nn.Linear(ffn, width)})
        self.ls2 = ChannelScale(width) if scaled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        x = x + self.ls1(self.attn["proj"](attended))
        return x + self.ls2(self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x)))))


class ChannelScale(nn.Module):
    """A learned factor for each channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale_factor = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale_factor


class AttentionPool(nn.Module):
    """SigLIP's pooling, kept for its weights alone."""

    def __init__(self, width: int, ffn: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, ffn), "fc2": nn.Linear(ffn, width)})


class Projector(nn.Module):
    """Patches of both towers to tokens of the language model."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(vision_width, 4 * vision_width)
        self.fc2 = nn.Linear(4 * vision_width, width)
        self.fc3 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc3(F.gelu(self.fc2(F.gelu(self.fc1(x)))))


def _llama(sizes: OFTSizes) -> nn.Module:
    # A heavy import, which the workers of a script that imports this module are spared.
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=sizes.width,
            intermediate_size=sizes.ffn,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.kv_heads,
            vocab_size=sizes.vocabulary,
            rms_norm_eps=sizes.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": sizes.rope_base},
            tie_word_embeddings=False,
        )
    )
    recomputing(model.model.layers)
    return model


def openvla_token_values(bins: int = 256) -> Tensor:
    """Normalized actions of OpenVLA's tokens, by ascending token id, float32 (bins,).

    The last ``bins`` ids of the vocabulary stand for edges -1 ... 1 in descending order, and an edge means the center
    of the interval above it; the lowest id, which has none, means that of the interval below.
    """
    edges = torch.linspace(-1.0, 1.0, bins, dtype=torch.float64)
    centers = (edges[:-1] + edges[1:]) / 2
    interval = (bins - 1 - torch.arange(bins)).clamp(max=bins - 2)
    return centers[interval].float()
