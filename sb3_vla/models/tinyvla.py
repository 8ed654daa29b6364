"""TinyVLA (Wen et al. 2024): a CLIP or SigLIP tower, Pythia (GPT-NeoX) and a diffusion head.

Towers are transformers' own classes, the head is the U-Net of Diffusion Policy, so published weights fit one to one.
The original averages the language model's last states over its padding too, which makes a sample's condition depend on
its batch; here padding is left out, which is what the original does with the batches of one that it acts by.
The original's prompt ends in one space when acting and two in training; here it is the former in both.

A decision has one image. A model of two ``cameras`` takes it as both; whoever has two gives ``image``
(N, 2, 3, h, w).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mw_envs.tasks import decode_instruction, did_you_mean
from sb3_vla.common.errors import InputError
from sb3_vla.models.base import PERCEPTION, Context
from sb3_vla.models.diffusion import ConditionalUnet1d, DiffusionModel, check_horizon, shrink
from sb3_vla.models.recomputing import recomputing
from sb3_vla.models.resizing import resize_by_integers
from sb3_vla.models.tokenizing import byte_tokenizer

PROMPT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: <image>\n{instruction} ASSISTANT: <|endoftext|>"
)
TOWERS = ("clip", "siglip")
PADDING = 1
_PIXELS = {
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "siglip": ((0.5,) * 3, (0.5,) * 3),
}
# Sizes of the model that trains from scratch.
_VISION = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
}
_LANGUAGE = {
    "vocab_size": 258,
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}


class TinyVLA(DiffusionModel):
    """TinyVLA. The defaults are a small one that trains from scratch; the published ones have CLIP ViT-L/14 at 336
    pixels, Pythia 70M, 410M or 1B, and ``down_dims=(256, 512, 1024), step_dim=256``.

    :param action_dim: A.
    :param action_horizon: H, a multiple of 2^(levels - 1).
    :param state_dim: size of the proprioceptive state.
    :param image_size: side of the square image, before the tower's own preprocessing.
    :param tower: ``clip`` or ``siglip``.
    :param vision: transformers' settings of the tower that are not its defaults.
    :param language: transformers' settings of GPT-NeoX that are not its defaults.
    :param tokenizer: content of a ``tokenizer.json``; None for one that reads bytes.
    :param prompt: with ``<image>`` and ``{instruction}``.
    :param cameras: 1 or 2.
    :param center_crop: cut 2.5 % off each side, as the original does.
    :param down_dims: channels of the U-Net's levels.
    :param step_dim: size of the timestep's embedding.
    :param bf16_time: compute that embedding in bfloat16, as the original does; its weights expect the phases so
        rounded.
    :param timesteps: T.
    :param normalization: of ``state`` and ``action``.
    :param mask_padding: see :class:`DiffusionModel`.
    """

    def __init__(
        self,
        action_dim: int = 4,
        action_horizon: int = 8,
        state_dim: int = 4,
        image_size: int = 64,
        tower: str = "clip",
        vision: Mapping[str, Any] | None = None,
        language: Mapping[str, Any] | None = None,
        tokenizer: Mapping[str, Any] | None = None,
        prompt: str = "<image>\n{instruction}<|endoftext|>",
        cameras: int = 1,
        center_crop: bool = False,
        down_dims: Sequence[int] = (64, 128, 256),
        step_dim: int = 64,
        bf16_time: bool = False,
        timesteps: int = 100,
        normalization: Mapping[str, str] | None = None,
        mask_padding: bool = True,
    ) -> None:
        modes = {"state": "mean_std", "action": "min_max", **(normalization or {})}
        super().__init__(
            action_dim, action_horizon, state_dim, "epsilon", timesteps, "squaredcos_cap_v2", modes, mask_padding
        )
        vision = dict(_VISION if vision is None else vision)
        language = dict(_LANGUAGE if language is None else language)
        self.config = {
            "action_dim": action_dim,
            "action_horizon": action_horizon,
            "state_dim": state_dim,
            "image_size": image_size,
            "tower": tower,
            "vision": vision,
            "language": language,
            "tokenizer": None if tokenizer is None else dict(tokenizer),
            "prompt": prompt,
            "cameras": cameras,
            "center_crop": center_crop,
            "down_dims": list(down_dims),
            "step_dim": step_dim,
            "bf16_time": bf16_time,
            "timesteps": timesteps,
            "normalization": modes,
            "mask_padding": mask_padding,
        }
        check_horizon(action_horizon, down_dims)
        if tower not in TOWERS:
            raise InputError(f"Unknown tower={tower!r}; {did_you_mean(tower, TOWERS)}")
        if cameras not in (1, 2):
            raise InputError(f"cameras={cameras}; expected 1 or 2")
        if prompt.count("<image>") != 1 or "{instruction}" not in prompt.partition("<image>")[2]:
            raise InputError(f"prompt={prompt!r}; expected one <image> and {{instruction}} after it")
        self.image_size = (image_size, image_size)
        self.cameras, self.center_crop, self.tower, self.prompt = cameras, center_crop, tower, prompt
        # Heavy imports, of which only this model has need.
        from transformers import (
            CLIPVisionConfig,
            CLIPVisionModel,
            GPTNeoXConfig,
            GPTNeoXModel,
            SiglipVisionConfig,
            SiglipVisionModel,
        )

        self.tokenizer = read_tokenizer(tokenizer)
        self.gpt_neox: Any = GPTNeoXModel(GPTNeoXConfig(**{**language, "use_cache": False}))
        if tower == "clip":
            self.vision_tower: Any = CLIPVisionModel(CLIPVisionConfig(**vision))
        else:
            self.vision_tower = SiglipVisionModel(SiglipVisionConfig(**vision))
        recomputing([*self.vision_tower.encoder.layers, *self.gpt_neox.layers])
        hidden, seen = self.gpt_neox.config.hidden_size, self.vision_tower.config.hidden_size
        tokens = self.tokenizer.get_vocab_size()
        if tokens > self.gpt_neox.config.vocab_size:
            raise InputError(
                f"The tokenizer has {tokens} tokens, the language model vocab_size={self.gpt_neox.config.vocab_size}; "
                "give the tokenizer that belongs to it"
            )
        self.mm_projector = nn.Sequential(nn.Linear(seen, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        self.norm_after_pool = nn.LayerNorm(hidden)
        self.combine = nn.Linear(hidden + state_dim, hidden)
        sinusoid = bf16_sinusoid if bf16_time else None
        self.unet = ConditionalUnet1d(action_dim, hidden, down_dims, step_dim=step_dim, sinusoid=sinusoid)
        self.feature_dim = hidden

    def backbone(self) -> Iterator[nn.Parameter]:
        """See :meth:`VLAModel.backbone`."""
        for part in (self.vision_tower, self.mm_projector, self.gpt_neox):
            yield from part.parameters()

    def perceive(self, observation: dict[str, Tensor]) -> dict[str, Tensor]:
        """See :meth:`VLAModel.perceive`; ``image`` may have a second axis of cameras.

        :raises ValueError: for another number of cameras.
        """
        image = observation["image"]
        views = image.shape[1] if image.ndim == 5 else 1
        if views not in (1, self.cameras):
            raise InputError(f"image has {views} cameras; expected 1 or cameras={self.cameras}")
        seen = self.look(self.pixels(image.reshape(-1, *image.shape[-3:])))
        seen = seen.unflatten(0, (-1, views)).expand(-1, self.cameras, -1, -1).flatten(1, 2)
        embeddings, mask = self.sequence(seen, observation["instruction"])
        states = self.read(embeddings, mask)
        weight = mask[:, :, None].to(states.dtype)
        return {
            PERCEPTION + "pooled": (states * weight).sum(1) / weight.sum(1),
            "state": observation["state"],
        }

    def pixels(self, image: Tensor) -> Tensor:
        """What the tower reads of images uint8 (N, 3, h, w), as the original prepares them: the crop, stretched to
        the image's size and cut to whole levels, then Pillow's bicubic interpolation, whose two passes round to
        whole levels."""
        size = self.vision_tower.config.image_size
        image = shrink(image.float(), self.image_size[0])
        if self.center_crop:
            image = (self.crop(image) * 255).clamp(0, 255).floor()
        if image.shape[2] != size:
            image = resize_by_integers(image.round().to(torch.uint8), (size, size), "cubic").float()
        mean, std = (torch.tensor(values, device=image.device).view(3, 1, 1) for values in _PIXELS[self.tower])
        return (image / 255 - mean) / std

    def crop(self, image: Tensor) -> Tensor:
        """Images (N, 3, s, s) of levels 0 ... 255 without 2.5 % at each side, stretched to s again, 0 ... 1."""
        side = image.shape[2]
        margin = int(side * 0.025)
        window = (image / 255)[:, :, margin : side - margin, margin : side - margin]
        return F.interpolate(window, (side, side), mode="bilinear", antialias=True)

    def look(self, pixels: Tensor) -> Tensor:
        """Tokens of images for the language model, (N, patches, hidden): the last but one block's, projected."""
        patches = self.vision_tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]
        return self.mm_projector(patches[:, 1:] if self.tower == "clip" else patches)

    def sequence(self, seen: Tensor, instruction: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of prompt and images (N, T, hidden), padded on the right, and which are no padding, bool."""
        before, after = self.prompt.split("<image>")
        unique, inverse = torch.unique(instruction, dim=0, return_inverse=True)
        texts = [after.format(instruction=decode_instruction(sentence.cpu().numpy())) for sentence in unique]
        tokens = [torch.tensor(self.tokenizer.encode(text).ids) for text in texts]
        ids = nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=PADDING).to(seen.device)
        lengths = torch.tensor([len(row) for row in tokens], device=seen.device)
        valid = torch.arange(ids.shape[1], device=seen.device) < lengths[:, None]
        embed = self.gpt_neox.get_input_embeddings()
        head = torch.tensor(self.tokenizer.encode(before).ids, dtype=torch.int64, device=seen.device)
        parts = [embed(head).expand(len(seen), -1, -1), seen, embed(ids)[inverse]]
        always = torch.ones(len(seen), len(head) + seen.shape[1], dtype=torch.bool, device=seen.device)
        return torch.cat(parts, dim=1), torch.cat([always, valid[inverse]], dim=1)

    def read(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        """The language model's last states (N, T, hidden)."""
        return self.gpt_neox(inputs_embeds=embeddings, attention_mask=mask.long(), use_cache=False).last_hidden_state

    def contextualize(self, perception: dict[str, Tensor]) -> Context:
        """See :meth:`VLAModel.contextualize`."""
        pooled = self.norm_after_pool(perception[PERCEPTION + "pooled"])
        state = self._normalize("state", perception["state"].float())
        condition = self.combine(torch.cat([pooled, state], dim=1))
        return Context(condition.float(), condition)

    def denoise(self, context: Context, x: Tensor, t: Tensor) -> Tensor:
        """See :meth:`VLAModel.denoise`."""
        return self.unet(x, t, context.state.repeat(len(x) // len(context.state), 1)).float()


def bf16_sinusoid(t: Tensor, size: int) -> Tensor:
    """:func:`step_sinusoid` with every intermediate result in bfloat16."""
    half = size // 2
    numbers = torch.arange(half, device=t.device, dtype=torch.bfloat16)
    frequency = torch.exp(numbers * (-math.log(10_000) / (half - 1)))
    angle = t[:, None].to(torch.bfloat16) * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


def read_tokenizer(content: Mapping[str, Any] | None) -> Any:
    """A ``tokenizers.Tokenizer`` from the content of a ``tokenizer.json``; None for one token a byte.

    :raises ValueError: if it is none.
    """
    from tokenizers import Tokenizer

    text = byte_tokenizer(("<|endoftext|>", "<|padding|>")) if content is None else json.dumps(content)
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # the library raises no narrower class
        raise InputError(f"The tokenizer's content is no tokenizer.json: {error}") from error
