"""Success on fixed trials: protocols, results, intervals, and the callback that measures while training."""

from typing import TYPE_CHECKING

from sb3_vla.common.lazy import lazy_names

if TYPE_CHECKING:
    from sb3_vla.evaluation.evaluation import VideoOptions, evaluate, make_trial_vec_env, trials_for
    from sb3_vla.evaluation.protocols import Protocol, find_protocol
    from sb3_vla.evaluation.results import Comparison, EvaluationResult, compare

__all__ = [
    "Comparison",
    "EvaluationResult",
    "Protocol",
    "VideoOptions",
    "compare",
    "evaluate",
    "find_protocol",
    "make_trial_vec_env",
    "trials_for",
]
__getattr__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("VideoOptions", "evaluate", "make_trial_vec_env", "trials_for"), "evaluation"),
        **dict.fromkeys(("Protocol", "find_protocol"), "protocols"),
        **dict.fromkeys(("Comparison", "EvaluationResult", "compare"), "results"),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
