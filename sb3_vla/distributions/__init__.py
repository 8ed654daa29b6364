"""Action distributions: one file each, one line in :data:`DISTRIBUTIONS`."""

from sb3_vla.distributions.base import ActionDistribution, Trace, integrate
from sb3_vla.distributions.flow_sde import FlowSDE
from sb3_vla.distributions.gaussian import GaussianChunk

DISTRIBUTIONS = ("gaussian", "flow_sde")


def make_distribution(name: str, action_chunk: int, action_dim: int, **options: object) -> ActionDistribution:
    """Build a distribution by name.

    :param name: a name in :data:`DISTRIBUTIONS`.
    :param options: see the classes.
    :raises ValueError: for an unknown name or option.
    """
    from mw_envs.tasks import did_you_mean

    try:
        if name == "gaussian":
            return GaussianChunk(action_chunk, action_dim, **options)  # type: ignore[arg-type]
        if name == "flow_sde":
            return FlowSDE(action_chunk, **options)  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"Distribution {name!r} does not take these options: {options} ({error})") from error
    raise ValueError(f"Unknown action distribution {name!r}; {did_you_mean(name, DISTRIBUTIONS)}")


__all__ = ["DISTRIBUTIONS", "ActionDistribution", "FlowSDE", "GaussianChunk", "Trace", "integrate", "make_distribution"]
