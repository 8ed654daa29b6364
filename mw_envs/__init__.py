"""MetaWorld for vision-language-action policies: a Gymnasium plug-in.

>>> import gymnasium as gym, mw_envs
>>> env = gym.make("MetaWorldMT50-v0")  # doctest: +SKIP
"""

from importlib.metadata import version

from mw_envs.registration import ENV_IDS, register_envs
from mw_envs.tasks import (
    DIFFICULTIES,
    SUITES,
    TASKS,
    Task,
    Trial,
    decode_instruction,
    encode_instruction,
    fit_instruction,
    get_task,
    suite_tasks,
)

__version__ = version("sb3-vla")
__all__ = [
    "DIFFICULTIES",
    "ENV_IDS",
    "SUITES",
    "TASKS",
    "Task",
    "Trial",
    "__version__",
    "decode_instruction",
    "encode_instruction",
    "fit_instruction",
    "get_task",
    "register_envs",
    "suite_tasks",
]

register_envs()
