"""Typed configuration: nested dataclasses to YAML and back, with ``key=value`` overrides.

The schema is an ordinary dataclass; its annotations are the types that are checked and its defaults are the defaults::

    @dataclass
    class TrainConfig:
        seed: int = 0
        output: str = "runs/${seed}"
        sft: SFTConfig = field(default_factory=SFTConfig)  # a dataclass with a field ``steps``

    config = load_config(TrainConfig, "recipe.yaml", ["sft.steps=100", "seed=3"])
    config.sft.steps, config.output  # 100, "runs/3"

The order is defaults, then the file, then the overrides from left to right. ``${sft.steps}`` refers to another value
and is resolved last, so it sees the overrides. A check across fields belongs into the dataclass's ``__post_init__``.

A file may build on another: ``base: other.yaml``, beside it, is read first. A schema may have three class attributes:
``ALIASES``, other names of its keys, or one name for several; ``REFUSED``, keys or sections that are known and not
taken, with the reason; and ``BASES``, a folder of files that can be built on from anywhere.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from os import PathLike
from pathlib import Path, PurePath
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from sb3_vla.common.errors import InputError
from sb3_vla.common.paths import local_path

T = TypeVar("T")


class ConfigError(InputError):
    """A configuration that cannot be used."""


def deciding_settings(config: Any) -> dict[str, Any]:
    """The values of a dataclass instance that decide the result of a run.

    Its class attribute ``INCIDENTAL`` names the others, which say how, where and how far a run goes.
    """
    names = [field.name for field in dataclasses.fields(config)]
    return {name: getattr(config, name) for name in names if name not in getattr(config, "INCIDENTAL", ())}


def load_config(cls: type[T], yaml_path: str | PathLike[str] | None = None, overrides: Iterable[str] = ()) -> T:
    """Build a dataclass instance from its defaults, a YAML file and overrides.

    :param cls: the dataclass; its fields may be dataclasses, ``int``, ``float``, ``bool``, ``str``, ``Path``, ``Enum``,
        ``Literal``, ``X | None``, ``list[X]``, ``tuple[X, ...]`` and ``dict[str, X]``
    :param yaml_path: a YAML file with any part of the configuration
    :param overrides: ``"a.b=value"`` strings; the value is read as YAML, as in ``"tasks=[reach-v3, push-v3]"``. A
        mapping takes the place of a ``dict``, of which ``"a.b.name=value"`` sets one key
    :return: an instance of ``cls`` with every ``${...}`` resolved
    :raises ConfigError: for an unknown key (names the nearest known one), a wrong type, a missing required value, a
        broken ``${...}``, an unreadable file, or a ValueError of a ``__post_init__``
    """
    merged = OmegaConf.structured(cls)
    for path, layer in [] if yaml_path is None else read_layers(local_path(yaml_path), getattr(cls, "BASES", None)):
        merged = _merge(cls, merged, layer, f"{path}")
    for override in overrides:
        merged = _override(cls, merged, override)
    try:
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(cls, error)) from error
    except (TypeError, ValueError) as error:  # from a __post_init__
        raise ConfigError(str(error)) from error


def to_yaml(config: object) -> str:
    """The YAML text of a configuration; ``load_config`` reads it back to an equal one.

    :param config: a dataclass instance or a mapping
    :return: the text, every ``${...}`` resolved, keys in the order of the fields
    """
    tree = OmegaConf.create(dict(config)) if isinstance(config, Mapping) else OmegaConf.structured(config)
    plain = _plain(OmegaConf.to_container(tree, resolve=True, enum_to_str=True))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, PurePath) else value  # else YAML would get Python's own tags


def read_layers(path: Path, shipped: Path | None = None) -> list[tuple[Path, DictConfig]]:
    """A YAML file after those that it builds on, each with its path.

    :param shipped: folder of files that can be built on from anywhere; one beside the file that names it comes first.
    :raises ConfigError: for a file that cannot be read, or that builds on itself
    """
    layers: list[tuple[Path, DictConfig]] = []
    base: str | None = str(path)
    while base is not None:
        places = [path] if not layers else [path.parent / local_path(base)] + ([shipped / base] if shipped else [])
        found = [place for place in places if place.is_file()] or places[:1]  # whose reading says what is wrong
        new = [place for place in found if all(place.resolve() != seen.resolve() for seen, _ in layers)]
        if not new:
            raise ConfigError(f"{layers[-1][0]}: base: {base} leads back to {found[0]}; a file cannot build on itself")
        path = new[0]
        layer = _read_yaml(path)
        base = layer.pop("base", None)
        if not isinstance(base, str | None):
            raise ConfigError(f"{path}: base = {base!r}, expected the name of a YAML file beside it")
        layers.insert(0, (path, layer))
    return layers


def _read_yaml(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(loaded, DictConfig):
        raise ConfigError(f"{path} holds a {type(loaded).__name__}, expected a mapping of keys to values")
    return loaded


def _override(cls: type, merged: Any, override: str) -> Any:
    addition = _parse_override(override)
    given = override.partition("=")[0].strip()
    key = getattr(cls, "ALIASES", {}).get(given, given)
    hint = None if isinstance(key, tuple) else dict(_known_keys(cls)).get(key)
    if isinstance(_given(addition, given), dict) and dict in [get_origin(part) for part in (hint, *get_args(hint))]:
        OmegaConf.update(merged, key, {}, merge=False)  # else what was there would stay beside it
    return _merge(cls, merged, addition, f"override {override!r}")


def _parse_override(override: str) -> DictConfig:
    key, equals, _ = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {override!r} is not of the form key=value, for example seed=3 or sft.steps=100")
    if "[" in key:
        raise ConfigError(f"override {override!r} sets one element; give the whole list: {key.split('[')[0]}=[...]")
    try:
        return OmegaConf.from_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"override {override!r} has no valid YAML value: {str(error).splitlines()[0]}") from error


def _merge(cls: type, base: Any, addition: DictConfig, source: str) -> Any:
    for alias, keys in getattr(cls, "ALIASES", {}).items():
        _rename(addition, alias, (keys,) if isinstance(keys, str) else keys)
    for section in [key for key, hint in _known_keys(cls) if dataclasses.is_dataclass(hint)]:
        value = _given(addition, section)
        if value is not None and not isinstance(value, dict):  # OmegaConf would take it without a word
            raise ConfigError(f"{source}: {section} is a section; got {value!r}, expected {section}.<name>=<value>")
    try:
        return OmegaConf.merge(base, addition)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_explain(cls, error, addition)}") from error


def leaves(tree: DictConfig) -> list[str]:
    """Keys of what a file or an override gives, in dotted form, without those of sections that hold others."""
    found: list[str] = []
    for key, value in dict(OmegaConf.to_container(tree, resolve=False)).items():  # type: ignore[arg-type]
        inner = leaves(OmegaConf.create(value)) if isinstance(value, dict) and value else [""]
        found += [f"{key!s}.{name}".removesuffix(".") for name in inner]
    return found


def _sections(key: str) -> Iterator[str]:
    """The key, then what it is in, from the inside out."""
    while key:
        yield key
        key = key.rpartition(".")[0]


def _rename(addition: DictConfig, alias: str, keys: Iterable[str]) -> None:
    section, _, name = alias.rpartition(".")
    parent = OmegaConf.select(addition, section) if section else addition
    if not isinstance(parent, DictConfig) or name not in parent:
        return
    value = OmegaConf.to_container(parent, resolve=False)[name]  # type: ignore[call-overload, index]
    del parent[name]
    if not parent and section:
        holder, _, inner = section.rpartition(".")
        del (OmegaConf.select(addition, holder) if holder else addition)[inner]
    for key in keys:
        OmegaConf.update(addition, key, value)


def _given(addition: DictConfig, key: str) -> Any:
    value = OmegaConf.select(addition, key, throw_on_resolution_failure=False)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def _explain(cls: type, error: OmegaConfBaseException, addition: DictConfig | None = None) -> str:
    """One line for what OmegaConf says in several."""
    key, reason = error.full_key or "", (error.msg or str(error)).splitlines()[0]
    known = dict(_known_keys(cls))
    if isinstance(error, ConfigKeyError):
        if addition is not None:  # OmegaConf names the section in which a key is unknown
            key = next((given for given in leaves(addition) if given.startswith(f"{key}.")), key)
        refused: Mapping[str, str] = getattr(cls, "REFUSED", {})
        for section in _sections(key):
            if section in refused:
                return f"{key} is not taken here: {refused[section]}"
        short = [alias for alias in getattr(cls, "ALIASES", {}) if "." not in alias]
        near = difflib.get_close_matches(key, [*([] if "." in key else short), *known], n=1, cutoff=0.5)
        top_level = ", ".join(name for name in known if "." not in name)
        return f"unknown key {key!r}; " + (f"did you mean {near[0]!r}?" if near else f"known: {top_level}")
    if isinstance(error, MissingMandatoryValue):
        return f"{key} has no value and no default; give {key}=..."
    if addition is None:
        return f"{key}: {reason}"
    # OmegaConf does not say which tuple has a wrong element or length.
    keys = [key] if key else [name for name, hint in known.items() if get_origin(hint) is tuple]
    found = {name: value for name in keys if (value := _given(addition, name)) is not None or name == key}
    return " or ".join(
        f"{name} = {value!r} does not fit, expected {_type_name(known[name])}" if name in known else f"{name}: {reason}"
        for name, value in found.items()
    )


def _known_keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of a dataclass in dotted form, sections included, with its annotation."""
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        yield prefix + field.name, hint
        for part in (hint, *get_args(hint)) if get_origin(hint) not in (dict, list, tuple) else ():
            if dataclasses.is_dataclass(part) and isinstance(part, type):
                yield from _known_keys(part, f"{prefix}{field.name}.")


def leaf_keys(cls: type) -> list[tuple[str, Any]]:
    """Every key of a dataclass that holds a value and not a section, in dotted form, with its annotation."""
    return [(key, hint) for key, hint in _known_keys(cls) if not dataclasses.is_dataclass(hint)]


def _type_name(hint: Any) -> str:
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(member.name for member in hint)}"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
