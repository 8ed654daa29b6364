"""Training on several nodes with Ray: environments, copies of the policy and learner where a placement says.

Ray is an optional extra, ``pip install "sb3-vla[ray]"``; importing this package does not import it.
"""

from sb3_vla.ray.placement import ClusterOptions, PlacementError, place

__all__ = ["ClusterOptions", "PlacementError", "place"]
