"""Imitation: supervised fine-tuning on demonstrations."""

from typing import TYPE_CHECKING

from sb3_vla.common.lazy import lazy_names

if TYPE_CHECKING:
    from sb3_vla.sft.imitation import SFTResult, sft
    from sb3_vla.sft.settings import SFTConfig

__all__ = ["SFTConfig", "SFTResult", "sft"]
__getattr__ = lazy_names(__name__, {"SFTConfig": "settings", "SFTResult": "imitation", "sft": "imitation"})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
