"""SmolVLA (Shukor et al. 2025): a small vision-language model, cut short, and a flow-matching expert beside it.

Image and sentence are read by SmolVLM2's vision tower and the first layers of its text tower; the state is one more
token, which sees them and which they do not see. The expert has one layer for each of the text tower's. In every
``self_attn_every``-th layer, beginning with the first, the action tokens attend to prefix and chunk (causally); in the
others to the prefix alone, through keys and values that are projections of the text tower's own.

What image and sentence give does not depend on state or actions, so :meth:`SmolVLA.perceive` ends there.
Letters besides those of :mod:`sb3_vla.models.base`: T prefix tokens without the state's, G layers, W width of the text
tower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sb3_vla.common import batch_noise as draw
from sb3_vla.common.errors import InputError
from sb3_vla.models.base import PERCEPTION, Context, VLAModel, sizes_of
from sb3_vla.models.compact import time_embedding
from sb3_vla.models.layers import GatedMLP, rms_normalized, rotation_of
from sb3_vla.models.layers import rotate as rotated
from sb3_vla.models.tokenizing import InstructionTokenizer, byte_tokenizer

SPECIAL_TOKENS = (
    "<pad>",
    "<|im_start|>",
    "<end_of_utterance>",
    "<fake_token_around_image>",
    "<global-img>",
    "<image>",
    "<unk>",
)
KEPT = ("prefix", "pictures")
PRECISIONS = ("float32", "mixed")
_EPSILON = 1e-8  # LeRobot's, beside a deviation that is divided by


@dataclass(frozen=True)
class VLMSizes:
    """Sizes of a SmolVLM2.

    :param width: of the text tower.
    :param ffn: hidden width of its perceptrons.
    :param heads: query heads.
    :param kv_heads: key and value heads.
    :param head_dim: width of a head.
    :param vocabulary: rows of the embedding.
    :param norm_eps: of its RMS norms.
    :param image_size: side of the image that the vision tower was trained on.
    :param patch_size: side of a patch.
    :param vision_width: of the vision tower.
    :param vision_ffn: hidden width of its perceptrons.
    :param vision_layers: its depth.
    :param vision_heads: its heads.
    :param scale: patches side by side that make one token of the text tower.
    """

    width: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    image_size: int
    patch_size: int
    vision_width: int
    vision_ffn: int
    vision_layers: int
    vision_heads: int
    scale: int
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads or self.vision_width % self.vision_heads:
            raise InputError(
                f"VLM heads={self.heads}, kv_heads={self.kv_heads}, vision_width={self.vision_width}, "
                f"vision_heads={self.vision_heads}; the second must divide the first, the fourth the third"
            )


_SIGLIP_BASE = {"image_size": 512, "patch_size": 16, "vision_width": 768, "vision_ffn": 3072, "vision_layers": 12}
#: the published ones by their names, and one for a laptop, which reads bytes and trains from scratch
VLM_SIZES = {
    "256M": VLMSizes(576, 1536, 9, 3, 64, 49280, **_SIGLIP_BASE, vision_heads=12, scale=4),
    "500M": VLMSizes(960, 2560, 15, 5, 64, 49280, **_SIGLIP_BASE, vision_heads=12, scale=4),
    "2.2B": VLMSizes(2048, 8192, 32, 32, 64, 49280, 384, 14, 1152, 4304, 27, 16, scale=3),
    "laptop": VLMSizes(128, 384, 4, 2, 32, 264, 96, 8, 96, 192, 3, 3, scale=2),
}


class SmolVLA(VLAModel):
    """SmolVLA of any size.

    :param action_dim: A.
    :param action_horizon: H.
    :param state_dim: size of the proprioceptive state.
    :param image_size: side of the square images that it is given; it resizes them itself.
    :param resolution: (height, width) that it resizes them to, bilinearly and without antialiasing, as LeRobot does;
        None for that of the vision tower.
    :param vlm: a name in :data:`VLM_SIZES`, or the sizes.
    :param layers: G, layers kept of the text tower.
    :param self_attn_every: every how many layers the expert attends to its own chunk as well; 0 for none.
    :param expert_width: of the expert, as a fraction of the text tower's.
    :param min_period: shortest period of the embedding of the flow time.
    :param max_period: longest one.
    :param latent_dim: L, width of the noisy actions.
    :param latent_state_dim: width that the state is padded to.
    :param tokenizer: contents of a ``tokenizer.json``; None for one token for each byte.
    :param max_tokens: tokens that are read of an instruction.
    :param image_special_tokens: whether tokens mark the image's start and end.
    :param absent_pictures: cameras that the model knows and that there are not.
    :param train_expert_only: freeze the vision-language model where ``trainable`` does not say what is trained. A
        folder of LeRobot's says it, and mostly does so; a model that begins from nothing has all to learn.
    :param kept: what :meth:`perceive` gives, and a rollout keeps where the backbone is frozen: keys and values of the
        whole ``prefix`` (2.3 MB a decision for 500M in bfloat16), or the ``pictures``' tokens (0.12 MB), from which an
        update runs the text tower again.
    :param precision: ``float32``, or ``mixed``: bfloat16 but for the projections around the expert and for its keys and
        values of the prefix, as LeRobot makes the model and its files.
    :raises ValueError: for sizes that do not fit each other.
    """

    state_mean: Tensor
    state_std: Tensor
    prompt_length: int

    def __init__(
        self,
        action_dim: int = 4,
        action_horizon: int = 50,
        state_dim: int = 4,
        image_size: int = 480,
        resolution: Sequence[int] | None = None,
        vlm: str | Mapping[str, Any] = "500M",
        layers: int = 16,
        self_attn_every: int = 2,
        expert_width: float = 0.75,
        min_period: float = 4e-3,
        max_period: float = 4.0,
        latent_dim: int = 32,
        latent_state_dim: int = 32,
        tokenizer: str | None = None,
        max_tokens: int = 48,
        image_special_tokens: bool = False,
        absent_pictures: int = 0,
        train_expert_only: bool = False,
        kept: str = "prefix",
        precision: str = "float32",
    ) -> None:
        super().__init__(action_dim, action_horizon)
        sizes = sizes_of("SmolVLA", "vlm", vlm, VLM_SIZES, VLMSizes)
        self.resolution = tuple(resolution or (sizes.image_size, sizes.image_size))
        self.config = {
            "action_dim": action_dim,
            "action_horizon": action_horizon,
            "state_dim": state_dim,
            "image_size": image_size,
            "resolution": list(self.resolution),
            "vlm": vlm if isinstance(vlm, str) else asdict(sizes),
            "layers": layers,
            "self_attn_every": self_attn_every,
            "expert_width": expert_width,
            "min_period": min_period,
            "max_period": max_period,
            "latent_dim": latent_dim,
            "latent_state_dim": latent_state_dim,
            "tokenizer": tokenizer,
            "max_tokens": max_tokens,
            "image_special_tokens": image_special_tokens,
            "absent_pictures": absent_pictures,
            "train_expert_only": train_expert_only,
            "kept": kept,
            "precision": precision,
        }
        for name, value, options in (("kept", kept, KEPT), ("precision", precision, PRECISIONS)):
            if value not in options:
                raise InputError(f"SmolVLA {name}={value!r}; expected {' or '.join(options)}")
        if action_dim > latent_dim or state_dim > latent_state_dim:
            raise InputError(
                f"SmolVLA action_dim={action_dim}, state_dim={state_dim}; expected at most latent_dim={latent_dim} and "
                f"latent_state_dim={latent_state_dim}"
            )
        side = self.resolution[0] // sizes.patch_size
        if len(self.resolution) != 2 or self.resolution[0] != self.resolution[1] or side < 1 or side % sizes.scale:
            raise InputError(
                f"SmolVLA resolution={self.resolution}; expected a square of patches of {sizes.patch_size}, their "
                f"number along a side a multiple of {sizes.scale}"
            )
        self.sizes, self.kept, self.latent_dim = sizes, kept, latent_dim
        self.image_size = (image_size, image_size)
        self.min_period, self.max_period = min_period, max_period
        self.register_buffer("state_mean", torch.zeros(state_dim))
        self.register_buffer("state_std", torch.ones(state_dim))
        self.tokenizer = InstructionTokenizer(
            byte_tokenizer(SPECIAL_TOKENS) if tokenizer is None else tokenizer, "{}", max_tokens, line=True
        )
        if self.tokenizer.size > sizes.vocabulary:
            raise InputError(
                f"The tokenizer has {self.tokenizer.size} tokens, the model {sizes.vocabulary}; use the tokenizer that "
                "the model was published with"
            )
        self.marks: list[int] = []
        if image_special_tokens:
            fake = self.tokenizer.special("<fake_token_around_image>")
            self.marks = [fake, self.tokenizer.special("<global-img>"), fake]
        self.absent_pictures, self.prompt_length = absent_pictures, max_tokens
        self.vision_model = _vision_tower(sizes)
        self.connector = nn.Linear(sizes.vision_width * sizes.scale**2, sizes.width, bias=False)
        self.text_model = Tower(
            [Layer(sizes.width, sizes.ffn, sizes, crosses=False) for _ in range(layers)], sizes.width, sizes.norm_eps
        )
        self.text_model.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        # Of no use here, but published checkpoints have it.
        self.lm_head = nn.Linear(sizes.width, sizes.vocabulary, bias=False).requires_grad_(False)
        width = int(sizes.width * expert_width)
        self.expert = Tower(
            [
                Layer(width, expert_ffn(width), sizes, crosses=not (self_attn_every and index % self_attn_every == 0))
                for index in range(layers)
            ],
            width,
            sizes.norm_eps,
        )
        self.state_proj = nn.Linear(latent_state_dim, sizes.width)
        self.action_in_proj = nn.Linear(latent_dim, width)
        self.action_out_proj = nn.Linear(width, latent_dim)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)
        self.action_feature_dim = width
        self.feature_dim = 2 * sizes.width
        if precision == "mixed":
            self._mix_precision()
        if train_expert_only:
            self.default_trainable = "expert"
            self.set_trainable(self.default_trainable)

    def backbone(self) -> Iterator[nn.Parameter]:
        """The vision-language model; see :meth:`VLAModel.backbone`."""
        for part in (self.vision_model, self.connector, self.text_model, self.lm_head):
            yield from part.parameters()

    def perceive(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`VLAModel.perceive`."""
        pictures = self.embed_pictures(self.resize(observation["image"]))
        tokens, mask = self.tokenize(observation["instruction"])
        kept = {"state": observation["state"]}
        if self.kept == "pictures":
            padding = (0, self.prompt_length - tokens.shape[1])
            return {
                PERCEPTION + "pictures": pictures,
                PERCEPTION + "tokens": F.pad(tokens, padding),
                PERCEPTION + "mask": F.pad(mask, padding),
                **kept,
            }
        return {**self.read_prefix(*self.embed_prefix(pictures, tokens, mask)), **kept}

    def contextualize(self, perception: dict[str, Tensor]) -> Context:
        """See :meth:`VLAModel.contextualize`."""
        if PERCEPTION + "pictures" in perception:
            pictures, tokens, mask = (perception[PERCEPTION + name] for name in ("pictures", "tokens", "mask"))
            perception = {**perception, **self.read_prefix(*self.embed_prefix(pictures, tokens, mask))}
        keys, values, mask, summary = (perception[PERCEPTION + name] for name in ("keys", "values", "mask", "summary"))
        position = mask.sum(1, keepdim=True)  # (N, 1): absent and padded tokens take none
        mask = F.pad(mask, (0, 1), value=True)  # (N, T + 1)
        hidden = self.state_token(perception["state"])[:, None]
        layers = []
        for index, layer in enumerate(self.text_model.layers):
            query, key, value = layer.self_attn.project(layer.input_layernorm(hidden))
            key = torch.cat([keys[:, index], rotate(key, position)], dim=1)
            value = torch.cat([values[:, index], value], dim=1)
            hidden = layer.finish(hidden, attend(rotate(query, position), key, value, mask[:, None]))
            expert = self.expert.layers[index]
            layers.append(expert.self_attn.cross(key, value) if expert.crosses else (key, value))
        features = torch.cat([summary.float(), self.text_model.norm(hidden)[:, 0].float()], dim=1)
        return Context(features, (layers, mask, position))

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """See :meth:`VLAModel.denoise`."""
        return self.denoise_features(context, x, t)[0]

    def denoise_features(self, context: Context, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`VLAModel.denoise_features`."""
        layers, mask, position = context.state
        repeats, horizon = len(x) // len(mask), x.shape[1]
        mask, position = mask.repeat(repeats, 1)[:, None], position.repeat(repeats, 1)
        steps = torch.arange(horizon, device=x.device)
        causal = (steps <= steps[:, None]).expand(len(x), -1, -1)
        own_mask = torch.cat([mask.expand(-1, horizon, -1), causal], dim=2)
        later = position + 1 + steps  # (R * N, H)
        hidden = self.embed_actions(x, t)
        for layer, (keys, values) in zip(self.expert.layers, layers, strict=True):
            keys, values = keys.repeat(repeats, 1, 1, 1), values.repeat(repeats, 1, 1, 1)
            normed = layer.input_layernorm(hidden)
            if layer.crosses:
                query = layer.self_attn.query(normed)
                attended = attend(rotate(query, steps[None]), keys, values, mask)
            else:
                query, key, value = layer.self_attn.project(normed)
                keys, values = torch.cat([keys, rotate(key, later)], 1), torch.cat([values, value], 1)
                attended = attend(rotate(query, later), keys, values, own_mask)
            hidden = layer.finish(hidden, attended)
        hidden = self.expert.norm(hidden).float()
        return self.action_out_proj(hidden), hidden

    def resize(self, image: Tensor) -> Tensor:
        """Images uint8 (N, 3, h, w) to -1 ... 1 at the model's resolution, float32: shrunk or enlarged as they are,
        black (-1) at the left and at the top where the shapes differ."""
        image = image.float() / 255
        height, width = self.resolution
        ratio = max(image.shape[3] / width, image.shape[2] / height)
        scaled = int(image.shape[2] / ratio), int(image.shape[3] / ratio)
        if scaled != tuple(image.shape[2:]):
            image = F.interpolate(image, scaled, mode="bilinear", align_corners=False)
        return F.pad(image, (width - scaled[1], 0, height - scaled[0], 0)) * 2 - 1

    def tokenize(self, instruction: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids, int64, and which are no padding, bool, (N, longest); uint8 (N, L) in."""
        ids = self.tokenizer(instruction)
        longest = max(len(row) for row in ids)
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids], device=instruction.device)
        lengths = torch.tensor([len(row) for row in ids], device=instruction.device)
        return tokens, torch.arange(longest, device=instruction.device) < lengths[:, None]

    def embed_pictures(self, image: Tensor) -> Tensor:
        """Tokens (N, tokens, W) of resized images: the vision tower's patches, scale x scale of them to a token."""
        patches = self.vision_model(pixel_values=image.to(self.connector.weight.dtype)).last_hidden_state
        side, scale = math.isqrt(patches.shape[1]), self.sizes.scale
        # Row-major within the square, and the squares row-major.
        blocks = patches.unflatten(1, (side // scale, scale, side // scale, scale)).transpose(2, 3)
        return self.connector(blocks.flatten(3, 5).flatten(1, 2))

    def embed_prefix(self, pictures: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Image and sentence as the text tower reads them, float32 (N, T, W), and which tokens are there (N, T)."""
        scale = math.sqrt(self.sizes.width)
        embed = self.text_model.embed_tokens
        parts = [pictures * scale]
        if self.marks:
            marks = embed(torch.tensor(self.marks, device=tokens.device)).expand(len(tokens), -1, -1)
            parts = [marks[:, :2], *parts, marks[:, 2:], *[marks] * self.absent_pictures]
        seen = sum(part.shape[1] for part in parts)
        embedded = torch.cat([*parts, embed(tokens) * scale], dim=1).float()
        return embedded, F.pad(mask, (seen, 0), value=True)

    def read_prefix(self, hidden: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The text tower on :meth:`embed_prefix`, every token seeing every other; padded to a constant length.

        :return: keys after rotation and values (N, G, T, kv heads, head width), mask (N, T), and the mean of the last
            layer over the tokens that are there, (N, W).
        """
        position = mask.cumsum(1) - 1
        keys, values = [], []
        for layer in self.text_model.layers:
            query, key, value = layer.self_attn.project(layer.input_layernorm(hidden))
            key = rotate(key, position)
            hidden = layer.finish(hidden, attend(rotate(query, position), key, value, mask[:, None]))
            keys.append(key)
            values.append(value)
        there = mask[:, :, None].to(hidden.dtype)
        padding = self.prefix_tokens - mask.shape[1]
        return {
            PERCEPTION + "keys": F.pad(torch.stack(keys, 1), (0, 0, 0, 0, 0, padding)),
            PERCEPTION + "values": F.pad(torch.stack(values, 1), (0, 0, 0, 0, 0, padding)),
            PERCEPTION + "mask": F.pad(mask, (0, padding)),
            PERCEPTION + "summary": (self.text_model.norm(hidden) * there).sum(1) / there.sum(1),
        }

    @property
    def prefix_tokens(self) -> int:
        """T with the longest instruction."""
        side = self.resolution[0] // self.sizes.patch_size // self.sizes.scale
        return side**2 + len(self.marks) * (1 + self.absent_pictures) + self.prompt_length

    def state_token(self, state: Tensor) -> Tensor:
        """The normalized state as a token, (N, W)."""
        state = (state.float() - self.state_mean) / (self.state_std + _EPSILON)
        return self.state_proj(F.pad(state, (0, self.state_proj.in_features - state.shape[1])))

    def embed_actions(self, x: Tensor, t: Tensor) -> Tensor:
        """Noisy actions and flow times as the expert's tokens, (R * N, H, expert width)."""
        actions = self.action_in_proj(x)
        time = time_embedding(t, actions.shape[2], self.min_period, self.max_period)
        both = torch.cat([actions, time.to(actions.dtype)[:, None].expand_as(actions)], dim=2)
        return self.action_time_mlp_out(F.silu(self.action_time_mlp_in(both)))

    def normalize_action(self, action: Tensor) -> Tensor:
        """See :meth:`VLAModel.normalize_action`."""
        return (action - self.action_mean) / (self.action_std + _EPSILON)

    def imitation_loss(
        self, observation: dict[str, Tensor], actions: Tensor, mask: Tensor, *, draws: int = 1
    ) -> Tensor:
        """See :meth:`VLAModel.imitation_loss`; the dimensions that do not act are noised with the others."""
        context = self.encode(observation)
        actions, mask = actions.repeat(draws, 1, 1), mask.repeat(draws, 1)
        noise = draw.normal((*actions.shape[:2], self.latent_dim), device=actions.device)
        t = self.sample_time(len(actions), actions.device)
        error = self.velocity_error(context, actions, noise, t)[..., : self.action_dim].square().mean(dim=2)
        return (error * mask).sum() / mask.sum()

    def velocity_error(self, context: Context, actions: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Predicted minus true velocity, (R * N, H, L), of actions in environment units with this noise and time."""
        x0 = F.pad(self.normalize_action(actions), (0, self.latent_dim - self.action_dim))
        time = t[:, None, None]
        return self.denoise(context, time * noise + (1 - time) * x0, t) - (noise - x0)

    def sample_time(self, count: int, device: torch.device) -> Tensor:
        """Flow times of a training batch, (count,): 0.001 + 0.999 Beta(1.5, 1), more noise than data."""
        return 0.001 + 0.999 * draw.uniform((count,), device=device) ** (1 / 1.5)

    def _mix_precision(self) -> None:
        for part in (self.vision_model, self.connector, self.text_model, self.lm_head, self.expert):
            part.to(torch.bfloat16)
        for layer in self.expert.layers:
            if layer.crosses:
                layer.self_attn.k_proj.float()
                layer.self_attn.v_proj.float()


class Tower(nn.Module):
    """Decoder layers and the norm after them."""

    embed_tokens: nn.Embedding
    layers: Any  # a ModuleList, whose items have no type

    def __init__(self, layers: Sequence[Layer], width: int, eps: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(width, eps)


class Layer(nn.Module):
    """A decoder layer in halves, because the two towers attend together.

    :param crosses: whether keys and values come from the text tower's layer instead of this one's input.
    """

    def __init__(self, width: int, ffn: int, sizes: VLMSizes, crosses: bool) -> None:
        super().__init__()
        self.crosses = crosses
        self.input_layernorm = RMSNorm(width, sizes.norm_eps)
        self.self_attn = Attention(width, sizes.kv_heads * sizes.head_dim if crosses else width, sizes)
        self.post_attention_layernorm = RMSNorm(width, sizes.norm_eps)
        self.mlp = GatedMLP(width, ffn, F.silu)

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The layer's output (N, tokens, width), from its input and what the heads gathered."""
        weight = self.self_attn.o_proj.weight
        # In mixed precision the sum takes the weights' type, as the original's in-place addition makes it.
        hidden = (self.self_attn.o_proj(attended.to(weight.dtype)) + hidden).to(weight.dtype)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Attention(nn.Module):
    """Projections of grouped-query attention; heads are (N, tokens, heads, head width)."""

    def __init__(self, width: int, source_width: int, sizes: VLMSizes) -> None:
        super().__init__()
        self.head_dim = sizes.head_dim
        self.q_proj = nn.Linear(width, sizes.heads * sizes.head_dim, bias=False)
        self.k_proj = nn.Linear(source_width, sizes.kv_heads * sizes.head_dim, bias=False)
        self.v_proj = nn.Linear(source_width, sizes.kv_heads * sizes.head_dim, bias=False)
        self.o_proj = nn.Linear(sizes.heads * sizes.head_dim, width, bias=False)

    def query(self, hidden: Tensor) -> Tensor:
        return self._heads(self.q_proj, hidden)

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a layer's own tokens."""
        return self.query(hidden), self._heads(self.k_proj, hidden), self._heads(self.v_proj, hidden)

    def cross(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a crossing layer, from the text tower's rotated keys and its values."""
        return self._heads(self.k_proj, keys.flatten(2)), self._heads(self.v_proj, values.flatten(2))

    def _heads(self, projection: nn.Linear, x: Tensor) -> Tensor:
        return projection(x.to(projection.weight.dtype)).unflatten(2, (-1, self.head_dim))


class RMSNorm(nn.Module):
    """Root mean square norm in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * rms_normalized(x, self.eps).to(x.dtype)


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary embedding (Su et al. 2021) of heads (N, tokens, heads, head width) at positions (N or 1, tokens).

    The base is 10,000 whatever the vision-language model was trained with, as SmolVLA was trained.
    """
    return rotated(x, rotation_of(position, x.shape[3], heads_at=2))


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """What the heads gather, (N, queries, heads * head width); mask bool (N, queries or 1, keys)."""
    query, key, value = (x.to(value.dtype).transpose(1, 2) for x in (query, key, value))
    gathered = F.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None], enable_gqa=True)
    return gathered.transpose(1, 2).flatten(2)


def expert_ffn(width: int) -> int:
    """Hidden width of the expert's perceptrons: 8/3 of its width, rounded up to a multiple of 256."""
    return 256 * -(-int(2 * width / 3) * 4 // 256)


def _vision_tower(sizes: VLMSizes) -> nn.Module:
    # A heavy import, which the workers of a script that imports this module are spared.
    from transformers import SmolVLMVisionConfig, SmolVLMVisionTransformer

    return SmolVLMVisionTransformer(
        SmolVLMVisionConfig(
            hidden_size=sizes.vision_width,
            intermediate_size=sizes.vision_ffn,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=sizes.vision_heads,
            image_size=sizes.image_size,
            patch_size=sizes.patch_size,
            layer_norm_eps=1e-6,
        )
    )
