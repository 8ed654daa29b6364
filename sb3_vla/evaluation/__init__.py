"""Success on fixed trials: protocols, results, intervals, and the callback that measures while training."""

from sb3_vla.evaluation.evaluation import VideoOptions, evaluate, make_trial_vec_env, trials_for
from sb3_vla.evaluation.results import Comparison, EvaluationResult, Protocol, compare, find_protocol

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
