"""Look-up of degradation components by name, and steps as JSON.

A component (`degradation.Component`) and the steps that it draws are found by name, `family.name`: `codecs.opus` and
`codecs.Opus` are both in `degradations/codecs.py`. To add one, write a step and a `Component` there, and give the
component a probability in a recipe (`degradation_recipes.py`).
"""

from collections.abc import Iterable
from dataclasses import asdict, is_dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from speechdistill.data import degradations
from speechdistill.data.degradation import Component, Step
from speechdistill.io.errors import UserError


def component(name: str) -> Component:
    """Return the component `family.name`; raises `UserError` if the family or the component does not exist."""
    family, member = _split(name)
    found = getattr(family, member, None)
    if member.startswith("_") or not isinstance(found, Component):
        raise _unknown(name)
    return found


def to_json(step: Step) -> dict[str, Any]:
    """Return a step as JSON values: `{"step": "codecs.Opus", "bitrate_bps": 16000, ...}`."""
    family = type(step).__module__.removeprefix(f"{degradations.__name__}.")
    return {"step": f"{family}.{type(step).__name__}", **asdict(step)}  # type: ignore[call-overload]


def from_json(value: dict[str, Any]) -> Step:
    """Invert `to_json`, also after a round trip through JSON text (lists become tuples).

    Raises `UserError` for a step or parameter that does not exist in this version.
    """
    parameters = {key: _tuples(v) for key, v in value.items() if key != "step"}
    kind = _step_type(value["step"])
    try:
        step: Step = kind(**parameters)
    except TypeError as error:
        reason = f"{value} was written by another version of speechdistill: {error}"
        raise UserError(reason, "install that version to read it") from error
    return step


def library_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of the libraries that affect the output of components `names`; "" for a missing library."""
    libraries = {"numpy", "scipy", "torch", "noisereduce", "pyroomacoustics"}
    libraries.update(library for name in names for library in component(name).libraries)
    return {library: _version(library) for library in sorted(libraries)}


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""


def _step_type(name: str) -> type[Any]:
    """Return a class of steps; only those that the family itself defines, since names come from stored plans too."""
    family, member = _split(name)
    kind = getattr(family, member, None)
    if not isinstance(kind, type) or kind.__module__ != family.__name__ or member.startswith("_"):
        raise _unknown(name)
    if not is_dataclass(kind) or not hasattr(kind, "apply"):
        raise UserError(f"{name} is not a degradation step", "correct the plan, or write it anew")
    return kind


def _split(name: str) -> tuple[ModuleType, str]:
    """Return the module of a family and the name within it."""
    family, _, member = name.partition(".")
    if family not in _families():
        raise UserError(f"degradation {name!r} is not part of this version", f"its families are {_families()}")
    return import_module(f"{degradations.__name__}.{family}"), member


def _unknown(name: str) -> UserError:
    family, _, member = name.partition(".")
    reason = f"degradation {name!r} is not part of this version: {family} has no {member}"
    return UserError(reason, "choose another, or install the version that has it")


@lru_cache(maxsize=1)  # lists a folder; called for every plan
def _families() -> list[str]:
    return sorted(module.name for module in iter_modules(degradations.__path__))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
