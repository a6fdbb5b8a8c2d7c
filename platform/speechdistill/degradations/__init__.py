"""Degradations: one file per family.

A **step** is a frozen dataclass of JSON values with `apply(wave) -> wave`: float32, shape (num_samples,), 16 kHz,
the same length and alignment out as in. A **component** is a function `(rng, scene) -> step` that draws a step's
parameters and opens no audio. Both are found by name, `family.name` (`codecs.Opus`, `codecs.opus`): a new one is
a new file or function, with nothing to register.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pkgutil import iter_modules
from typing import Any, Protocol

import numpy as np

from speechdistill.clips import Clips


@dataclass(frozen=True)
class Scene:
    """What a component may know when it draws: the speech segment, the clips at hand, the recipe's numbers."""

    clip_id: str
    speaker: str | None
    num_samples: int
    clips: Clips
    snr_mean_db: float = 10.0
    snr_sigma_db: float = 10.0


class Step(Protocol):
    """One degradation with all its parameters."""

    def apply(self, wave: np.ndarray) -> np.ndarray: ...

    def clip_ids(self) -> tuple[str, ...]:
        """Clips of the manifest that it reads, such as a noise recording."""


Component = Callable[[np.random.Generator, Scene], Step]


def component(name: str) -> Component:
    """The component `family.function`; raises `ValueError` with the families there are."""
    found: Component = _find(name)
    return found


def to_json(step: Step) -> dict[str, Any]:
    """A step as JSON values: `{"step": "codecs.Opus", "bitrate_bps": 16000, ...}`."""
    family = type(step).__module__.removeprefix(f"{__name__}.")
    return {"step": f"{family}.{type(step).__name__}", **asdict(step)}  # type: ignore[call-overload]


def from_json(value: dict[str, Any]) -> Step:
    """The inverse of `to_json`, also after a round through JSON text (lists become tuples).

    Raises `ValueError` for a step or parameter that this version does not know.
    """
    parameters = {key: _tuples(v) for key, v in value.items() if key != "step"}
    try:
        step: Step = _find(value["step"])(**parameters)
    except TypeError as error:
        raise ValueError(f"{value} was written by another version of speechdistill: {error}") from error
    return step


def library_versions() -> dict[str, str]:
    """Versions of the libraries whose change would change degraded audio."""
    return {name: version(name) for name in ("numpy", "scipy", "torch", "noisereduce", "pyroomacoustics")}


def _find(name: str) -> Any:
    family, _, member = name.partition(".")
    families = sorted(module.name for module in iter_modules(__path__))
    if family not in families:
        raise ValueError(f"degradation {name!r} is not part of this version; its families are {families}")
    module = import_module(f"{__name__}.{family}")
    found = getattr(module, member, None)
    # Names come from shards too: only what the family itself defines may be called.
    if member.startswith("_") or getattr(found, "__module__", None) != module.__name__:
        raise ValueError(f"degradation {name!r} is not part of this version: {family} has no {member}")
    return found


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
