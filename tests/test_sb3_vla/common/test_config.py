"""Typed configuration: precedence, interpolation, round trip, and one clear error for each kind of mistake."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import MISSING

from sb3_vla.common.config import ConfigError, load_config, to_yaml


class Camera(Enum):
    FRONT = 1
    SIDE = 2


@dataclass
class SFT:
    steps: int = 10
    learning_rate: float = 1e-3
    shuffle: bool = True
    tasks: list[str] = field(default_factory=lambda: ["reach-v3"])
    crop: tuple[float, float] = (0.1, 0.9)
    weights: dict[str, float] = field(default_factory=dict)
    limit: int | None = None
    camera: Camera = Camera.FRONT
    precision: Literal["float32", "bfloat16"] = "float32"
    folder: Path = Path("data")

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"sft.steps is {self.steps}, expected at least 1")


@dataclass
class Train:
    seed: int = 0
    output: str = "runs/${seed}"
    sft: SFT = field(default_factory=SFT)


@dataclass
class Required:
    dataset: str = MISSING


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text("seed: 3\nsft:\n  steps: 20\n  tasks: [push-v3]\n")
    return path


def test_a_mapping_takes_the_place_of_the_file_s(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("sft:\n  weights: {reach-v3: 2.0, push-v3: 1.0}\n")
    assert load_config(Train, path, ["sft.weights={reach-v3: 3.0}"]).sft.weights == {"reach-v3": 3.0}
    assert load_config(Train, path, ["sft.weights={}"]).sft.weights == {}
    one = load_config(Train, path, ["sft.weights.reach-v3=3.0"]).sft.weights
    assert one == {"reach-v3": 3.0, "push-v3": 1.0}
    # A section is not such a mapping.
    assert load_config(Train, path, ["sft={steps: 5}"]).sft == SFT(steps=5, weights={"reach-v3": 2.0, "push-v3": 1.0})
    with pytest.raises(ConfigError, match="many"):
        load_config(Train, path, ["sft.weights={reach-v3: many}"])


def test_defaults_then_file_then_overrides(recipe: Path) -> None:
    assert load_config(Train) == Train(output="runs/0")
    assert load_config(Train, recipe) == Train(seed=3, output="runs/3", sft=SFT(steps=20, tasks=["push-v3"]))
    config = load_config(Train, recipe, ["sft.steps=100", "sft.steps=200", "seed=5"])
    assert (config.sft.steps, config.seed, config.output, config.sft.tasks) == (200, 5, "runs/5", ["push-v3"])
    assert isinstance(config, Train) and isinstance(config.sft, SFT)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.learning_rate=1e-4", SFT(learning_rate=1e-4)),  # plain YAML 1.1 reads 1e-4 as text
        ("sft.shuffle=false", SFT(shuffle=False)),
        ("sft.tasks=[a, b]", SFT(tasks=["a", "b"])),
        ("sft.crop=[0.2, 0.3]", SFT(crop=(0.2, 0.3))),
        ("sft.weights.push-v3=2", SFT(weights={"push-v3": 2.0})),
        ("sft.limit=7", SFT(limit=7)),
        ("sft.limit=null", SFT()),
        ("sft.camera=SIDE", SFT(camera=Camera.SIDE)),
        ("sft.precision=bfloat16", SFT(precision="bfloat16")),
        ("sft.folder=/tmp/a=b", SFT(folder=Path("/tmp/a=b"))),
        ("sft={steps: 4, shuffle: false}", SFT(steps=4, shuffle=False)),
        ("sft.steps=${seed}", SFT(steps=8)),
    ],
)
def test_override_values(override: str, expected: SFT) -> None:
    assert load_config(Train, overrides=["seed=8", override]).sft == expected


def test_yaml_round_trip(tmp_path: Path) -> None:
    config = load_config(Train, overrides=["seed=4", "sft.camera=SIDE", "sft.crop=[0, 1]", "sft.weights={a: 1}"])
    text = to_yaml(config)
    assert "runs/4" in text and "${" not in text and "!!python" not in text
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert load_config(Train, path) == config
    assert to_yaml({"b": (1, 2), "a": Path("x")}) == "b:\n- 1\n- 2\na: x\n"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("sft.stpes=3", ["unknown key 'sft.stpes'", "'sft.steps'"]),
        ("steps=3", ["unknown key 'steps'", "'sft.steps'"]),
        ("qqqq=3", ["unknown key 'qqqq'", "seed, output, sft"]),
        ("sft={stpes: 3}", ["unknown key 'sft.stpes'", "'sft.steps'"]),
        ("sft.steps=many", ["sft.steps = 'many'", "expected int"]),
        ("sft.steps=1.5", ["sft.steps = 1.5", "expected int"]),
        ("sft.steps=true", ["sft.steps = True", "expected int"]),
        ("sft.steps=null", ["sft.steps = None", "expected int"]),
        ("sft.steps.x=3", ["sft.steps = {'x': 3}", "expected int"]),
        ("sft.tasks=push-v3", ["sft.tasks = 'push-v3'", "expected list[str]"]),
        ("sft.crop=[a, b]", ["sft.crop = ['a', 'b']", "expected tuple[float, float]"]),
        ("sft.crop=[0.5]", ["sft.crop = [0.5]", "expected tuple[float, float]"]),
        ("sft.weights.a=x", ["sft.weights.a", "'x'"]),
        ("sft.camera=TOP", ["sft.camera = 'TOP'", "FRONT, SIDE"]),
        ("sft.precision=int8", ["sft.precision = 'int8'", "'float32', 'bfloat16'"]),
        ("sft=3", ["sft is a section", "got 3"]),
        ("seed=${sft.nothing}", ["seed", "sft.nothing"]),
        ("sft.steps=-1", ["sft.steps is -1"]),
        ("sft.tasks[0]=push-v3", ["sft.tasks=[...]"]),
        ("sft.tasks=[push-v3", ["valid YAML"]),
        ("seed", ["'seed'", "key=value"]),
        ("=3", ["'=3'", "key=value"]),
    ],
)
def test_a_bad_override_is_one_clear_line(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Train, overrides=[override])
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("sft:\n  stpes: 3\n", ["unknown key 'sft.stpes'", "'sft.steps'"]),
        ("sft: 3\n", ["sft is a section"]),
        ("sft:\n  crop: [a, 1]\n", ["sft.crop = ['a', 1]"]),
        ("- 1\n- 2\n", ["expected a mapping"]),
        ("seed: 1\nseed: 2\n", ["not valid YAML", "seed"]),
        ("seed: [1\n", ["not valid YAML"]),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(Train, path)
    assert all(part in str(caught.value) for part in [str(path), *parts]), str(caught.value)


def test_missing_file_and_missing_value(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        load_config(Train, tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match=r"dataset has no value.*dataset=\.\.\."):
        load_config(Required)
    assert load_config(Required, overrides=["dataset=demos"]) == Required("demos")


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(Train, tmp_path / "empty.yaml") == load_config(Train)
