"""Many environments in a few worker processes, with observations in shared memory."""

from mw_envs.vector.vector_env import SharedMemoryVectorEnv, make_vector_env

__all__ = ["SharedMemoryVectorEnv", "make_vector_env"]
