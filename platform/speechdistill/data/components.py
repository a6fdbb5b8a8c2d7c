"""Degradation components by name, what they need, and steps as JSON.

A **component** is a function `(rng, scene) -> step` that draws a step's parameters and opens no audio. Both are found
by name, `family.name` (`codecs.Opus`, `codecs.opus`): a new one is a new file or function in `degradations/`, and its
odds in a recipe (`degradation_recipes.py`). What a component needs beside the code, trained weights or texts, stands in
its family's `NEEDS`, by the component's name; `OPTIONAL` has functions that raise `LibraryError` where a library of a
component is missing that not every installation has, and `LIBRARIES` those that decide its bits.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pkgutil import iter_modules
from typing import Any, get_args, get_type_hints

import numpy as np

from speechdistill.data import degradations
from speechdistill.data.degradation import Neural, Scene, Step
from speechdistill.io.assets import Need
from speechdistill.io.errors import UserError

Component = Callable[[np.random.Generator, Scene], Step]


def component(name: str) -> Component:
    """The component `family.function`; raises `UserError` with the families there are."""
    found: Component = _find(name)
    return found


def network(name: str) -> type[Neural] | None:
    """The kind of step that component `name` draws, where a network does it: its return type says so."""
    declared = get_type_hints(component(name)).get("return")
    kinds = [kind for kind in get_args(declared) or (declared,) if isinstance(kind, type) and issubclass(kind, Neural)]
    if kinds and kinds != [declared]:
        raise TypeError(f"component {name} draws {declared}; one with a network draws nothing else")
    return kinds[0] if kinds else None


def needs(name: str) -> tuple[Need, ...]:
    """The assets of component `name`."""
    module = import_module(component(name).__module__)
    found: Mapping[str, tuple[Need, ...]] = getattr(module, "NEEDS", {})
    return found.get(name.partition(".")[2], ())


def check(name: str) -> None:
    """Raise `LibraryError` where a library that component `name` wants, and not everybody has, is not installed."""
    module = import_module(component(name).__module__)
    checks: Mapping[str, Callable[[], None]] = getattr(module, "OPTIONAL", {})
    checks.get(name.partition(".")[2], lambda: None)()


def to_json(step: Step) -> dict[str, Any]:
    """A step as JSON values: `{"step": "codecs.Opus", "bitrate_bps": 16000, ...}`."""
    family = type(step).__module__.removeprefix(f"{degradations.__name__}.")
    return {"step": f"{family}.{type(step).__name__}", **asdict(step)}  # type: ignore[call-overload]


def from_json(value: dict[str, Any]) -> Step:
    """The inverse of `to_json`, also after a round through JSON text (lists become tuples).

    Raises `UserError` for a step or parameter that this version does not know.
    """
    parameters = {key: _tuples(v) for key, v in value.items() if key != "step"}
    kind = _find(value["step"])
    try:
        if not is_dataclass(kind) or not hasattr(kind, "apply"):
            raise TypeError(f"{value['step']} is no step")
        step: Step = kind(**parameters)  # type: ignore[assignment, operator]
    except TypeError as error:
        reason = f"{value} was written by another version of speechdistill: {error}"
        raise UserError(reason, "install that version to read it") from error
    return step


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of the libraries whose change would change what components `names` make; "" where one is missing."""
    wanted = {"numpy", "scipy", "torch", "noisereduce", "pyroomacoustics"}
    for name in names:
        module = import_module(component(name).__module__)
        wanted |= set(getattr(module, "LIBRARIES", {}).get(name.partition(".")[2], ()))
    return {name: _version(name) for name in sorted(wanted)}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _find(name: str) -> Any:
    family, _, member = name.partition(".")
    if family not in _families():
        raise UserError(f"degradation {name!r} is not part of this version", f"its families are {_families()}")
    module = import_module(f"{degradations.__name__}.{family}")
    found = getattr(module, member, None)
    # Names come from shards too: only what the family itself defines may be called.
    if member.startswith("_") or getattr(found, "__module__", None) != module.__name__:
        reason = f"degradation {name!r} is not part of this version: {family} has no {member}"
        raise UserError(reason, "choose another, or install the version that has it")
    return found


@lru_cache(maxsize=1)  # it looks through the folder, and every plan asks
def _families() -> list[str]:
    return sorted(module.name for module in iter_modules(degradations.__path__))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
