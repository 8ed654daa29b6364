"""What one learner has of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import gymnasium as gym

from sb3_vla.distributed.ranks import Ranks
from sb3_vla.policies.vla_policy import VLAPolicy
from sb3_vla.ray.connection import Cluster
from sb3_vla.ray.envs import RayVecEnv
from sb3_vla.ray.placement import PlacementError, Slot
from sb3_vla.ray.rollout import Replicas


@dataclass
class ClusterResources:
    """Slots in which a learner has its environments and copies of its policy.

    :ivar cluster: the connection.
    :ivar env: slots of environments.
    :ivar rollout: slots of copies of the policy.
    """

    cluster: Cluster
    env: list[Slot]
    rollout: list[Slot]
    _replicas: list[Replicas] = field(default_factory=list)

    @classmethod
    def of_rank(cls, cluster: Cluster, ranks: Ranks) -> ClusterResources:
        """What one of several learners has: a contiguous part of the slots; of too few, some learners share one."""
        return cls(cluster, _part(cluster.placement["env"], ranks), _part(cluster.placement["rollout"], ranks))

    def envs(self, env_fns: Sequence[Callable[[], gym.Env]], num_workers: int | None) -> RayVecEnv:
        """Environments in the ``env`` slots.

        :param num_workers: must be None: a placement says how many processes there are.
        :raises PlacementError: else, or if there are fewer environments than slots.
        """
        if num_workers is not None:
            raise PlacementError(
                f"num_workers={num_workers} is for one machine; on a cluster cluster.component_placement says how many "
                f"processes run environments, such as env: 0-3:0-{max(4, num_workers) - 1}"
            )
        return RayVecEnv(self.cluster, env_fns, self.env)

    def replicas(self, policy: VLAPolicy) -> Replicas:
        """Copies of a policy in the ``rollout`` slots."""
        self._replicas.append(Replicas(self.cluster, self.rollout, policy))
        return self._replicas[-1]

    def leave(self) -> None:
        """End the copies."""
        while self._replicas:
            self._replicas.pop().close()


def _part(slots: list[Slot], ranks: Ranks) -> list[Slot]:
    first, after = (len(slots) * number // ranks.count for number in (ranks.rank, ranks.rank + 1))
    return slots[first : max(after, first + 1)]
