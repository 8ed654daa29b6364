"""Placements: which process runs where, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from sb3_vla.common.config import load_config
from sb3_vla.ray import ClusterOptions, PlacementError, place
from sb3_vla.ray.connection import import_ray
from sb3_vla.ray.placement import Node
from sb3_vla.recipes.schema import ClusterSection, Recipe

EIGHT_GPUS = Node("a", 8, has_gpus=True)


def ranks(placement: dict[str, str], nodes: list[Node], num_nodes: int = 1) -> dict[str, list[tuple[int, int]]]:
    placed = place(ClusterOptions(num_nodes, placement), nodes)
    return {component: [(slot.node, slot.local) for slot in slots] for component, slots in placed.items()}


def on_first(*numbers: int) -> list[tuple[int, int]]:
    return [(0, number) for number in numbers]


def test_all_shared() -> None:
    found = ranks({"actor,env,rollout": "all"}, [EIGHT_GPUS])
    assert found == dict.fromkeys(("actor", "env", "rollout"), on_first(*range(8)))


def test_hybrid() -> None:
    found = ranks({"env": "0-3", "rollout": "4-7", "actor": "0-7"}, [EIGHT_GPUS])
    assert found == {"env": on_first(0, 1, 2, 3), "rollout": on_first(4, 5, 6, 7), "actor": on_first(*range(8))}


def test_disjoint_on_several_nodes_of_other_sizes() -> None:
    nodes = [Node("a", 2), Node("b", 4), Node("c", 8)]
    found = ranks({"env": "0-1,4", "rollout , actor": "2-3"}, nodes, num_nodes=2)
    assert found == {"env": [(0, 0), (0, 1), (1, 2)], "rollout": [(1, 0), (1, 1)], "actor": [(1, 0), (1, 1)]}
    placed = place(ClusterOptions(2, {"actor,env,rollout": "all"}), nodes)
    assert len(placed["env"]) == 6  # the third node has no part in it


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0-1:0-5", [0, 0, 0, 1, 1, 1]),
        ("3", [3]),
        ("0-1:2-3,2-3:0-1", [2, 3, 0, 1]),
        ("5:0-1, 6", [5, 5, 6]),
        ("all:0-15", [number // 2 for number in range(16)]),
    ],
)
def test_processes_of_accelerators(text: str, expected: list[int]) -> None:
    assert ranks({"env": text, "actor,rollout": "0"}, [EIGHT_GPUS])["env"] == on_first(*expected)


def test_slots_are_gpus_or_cpus() -> None:
    nodes = [EIGHT_GPUS, Node("b", 4)]
    placed = place(ClusterOptions(2, {"actor,rollout": "0", "env": "7-8"}), nodes)
    assert [slot.is_gpu for slot in placed["env"]] == [True, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_nodes": 0}, r"cluster.num_nodes=0; expected at least 1"),
        ({"component_placement": {"actor,env": "all"}}, r"does not place rollout; .* such as rollout: all"),
        ({"component_placement": {"actor,env,rolout": "all"}}, r"the component 'rolout'; did you mean 'rollout'"),
        ({"component_placement": {"actor,env": "0", "env,rollout": "1"}}, r"places env twice, by 'actor,env' and"),
        (
            {"component_placement": {"actor,env,rollout": "0..3"}},
            r"not understood at '0..3'; expected all, a range such as 0-3",
        ),
        ({"component_placement": {"actor,env,rollout": "-1"}}, r"not understood at '-1'"),
        ({"component_placement": {"actor,env,rollout": ""}}, r"not understood at ''"),
        ({"component_placement": {"actor,env,rollout": "3-0"}}, r"range 3-0 ends before it begins; expected 0-3"),
        ({"component_placement": {"actor,env,rollout": "0-1:0-2"}}, r"3 processes cannot be shared equally by 2"),
        ({"component_placement": {"actor,env,rollout": "0:0-1,1:1"}}, r"places process 1 twice"),
        ({"component_placement": {"actor,env,rollout": "0:1"}}, r"numbers the processes \[1\]; expected 0 to 0"),
    ],
)
def test_what_no_cluster_can_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        ClusterOptions(**options)


def test_what_this_cluster_cannot_have() -> None:
    with pytest.raises(PlacementError, match=r"env: 0-8 names number 8, but the 1 node\(s\) have 8 GPUs; .* 0 to 7"):
        ranks({"env": "0-8", "actor,rollout": "0"}, [EIGHT_GPUS])
    with pytest.raises(PlacementError, match=r"names number 4, but .* have 4 CPU slots"):
        ranks({"actor,env,rollout": "4"}, [Node("a", 4)])
    with pytest.raises(PlacementError, match=r"num_nodes=2, but the cluster has 1; .* or set cluster.num_nodes=1"):
        ranks({"actor,env,rollout": "all"}, [EIGHT_GPUS], num_nodes=2)


def test_ray_is_not_imported_and_its_lack_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import sys, sb3_vla, sb3_vla.ray, sb3_vla.ray.launch; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PlacementError, match=r'needs Ray, which is not installed; .* `pip install "sb3-vla\[ray\]"`'):
        import_ray()


def test_recipes_name_a_cluster() -> None:
    assert ClusterSection().options() is None
    placement = {"env": "0-3", "rollout": "4-7", "actor": "0"}
    overrides = ["cluster.num_nodes=2", "cluster.component_placement={env: 0-3, rollout: 4-7, actor: 0}"]
    recipe = load_config(Recipe, overrides=overrides)
    assert recipe.cluster.options() == ClusterOptions(2, placement)
    with pytest.raises(PlacementError, match=r"num_nodes=2 needs a placement; give cluster.component_placement="):
        ClusterSection(num_nodes=2).options()
