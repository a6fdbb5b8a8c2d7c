"""Degradations: one file per family.

A **step** is a frozen dataclass of JSON values with `apply(wave) -> wave`: float32, shape (num_samples,), 16 kHz,
the same length and alignment out as in. A **component** is a function `(rng, scene) -> step` that draws a step's
parameters and opens no audio. Both are found by name, `family.name` (`codecs.Opus`, `codecs.opus`): a new one is
a new file or function, with nothing to register. What a component needs beside the code, trained weights or texts,
stands in its family's `NEEDS`, by the component's name; `OPTIONAL` has functions that raise `ImportError` where a
library of a component is missing that not every installation has, and `LIBRARIES` those that decide its bits.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from functools import lru_cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from pkgutil import iter_modules
from typing import Any, ClassVar, Protocol, get_args, get_type_hints

import numpy as np

from speechdistill.clips import Clips
from speechdistill.io import assets
from speechdistill.io.assets import Asset, Need


@dataclass(frozen=True)
class Scene:
    """What a component may know when it draws: the speech segment, the clips at hand, the recipe's numbers."""

    clip_id: str
    speaker: str | None
    num_samples: int
    clips: Clips
    snr_mean_db: float = 10.0
    snr_sigma_db: float = 10.0
    assets: Mapping[str, Asset] = field(default_factory=dict)


class Step(Protocol):
    """One degradation with all its parameters."""

    def apply(self, wave: np.ndarray) -> np.ndarray: ...

    def clip_ids(self) -> tuple[str, ...]:
        """Clips of the manifest that it reads, such as a noise recording."""


@dataclass(frozen=True)
class Neural(ABC):
    """A step that a trained network does: `weights` and `sha256` are an `Asset`, and come before its own parameters.

    Equal steps take waves of equal length in one batch, which changes what comes out by 1e-4 at most.
    """

    need: ClassVar[Need]
    """Its weights."""

    weights: str
    sha256: str

    @classmethod
    @abstractmethod
    def load(cls, path: Path, device: str) -> Any:
        """The network from its weights, a local file or folder, on a torch device, without gradients.

        Raises any exception for a file that is not such weights, `ImportError` for a library that is missing.
        """

    @abstractmethod
    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        """float32 (batch, num_samples) at 16 kHz, the same shape out and each wave where it was."""

    def apply(self, wave: np.ndarray) -> np.ndarray:
        result: np.ndarray = apply_batch(self, wave[None])[0]
        return result

    def clip_ids(self) -> tuple[str, ...]:
        return ()


def apply_together(
    steps: Sequence[Neural], waves: Sequence[np.ndarray], last: Sequence[bool]
) -> list[np.ndarray | Exception]:
    """`steps[i].apply(waves[i])`; on a GPU in batches, and where one fails, each of its waves alone.

    Only a step that is its plan's `last` shares a batch: a codec that followed would make more of a difference of
    1e-7. On a CPU a batch is not faster, and one by one every sample is the same bit for bit whatever it came with.
    Raises what `loaded` does.
    """
    groups: dict[tuple[Neural, int, int], list[int]] = {}
    for i, (step, wave) in enumerate(zip(steps, waves, strict=True)):
        alone = not last[i] or _device() != "cuda"
        groups.setdefault((step, len(wave), i if alone else -1), []).append(i)
    results: list[np.ndarray | Exception] = [np.empty(0)] * len(waves)
    for (step, *_), members in groups.items():
        loaded(type(step), Asset(step.weights, step.sha256))  # a fault of the weights is no wave's
        try:
            batch = apply_batch(step, np.stack([waves[i] for i in members]))
        except Exception as error:
            for i in members:
                results[i] = error if len(members) == 1 else apply_together([step], [waves[i]], [False])[0]
        else:
            for i, wave in zip(members, batch, strict=True):
                results[i] = wave
    return results


def apply_batch(step: Neural, waves: np.ndarray) -> np.ndarray:
    """A step on waves of one length, (batch, num_samples)."""
    import torch

    network = loaded(type(step), Asset(step.weights, step.sha256))
    # With TF32, which cuDNN takes by default, a wave would differ by more than 1e-4 with its batch.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return step.apply_batch(network, waves)


@lru_cache(maxsize=32)
def loaded(kind: type[Neural], asset: Asset) -> Any:
    """The network of a kind of step, kept for this process, on a GPU where there is one.

    Raises `ValueError` naming the source of weights that are missing, have changed or are none.
    """
    path = assets.local(kind.need, asset)
    try:
        return kind.load(path, _device())
    except ImportError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise ValueError(f"{asset.source} is not {kind.need.what}: {reason}") from error


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


Component = Callable[[np.random.Generator, Scene], Step]


def component(name: str) -> Component:
    """The component `family.function`; raises `ValueError` with the families there are."""
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
    """Raise `ImportError` where a library that component `name` wants, and not everybody has, is not installed."""
    module = import_module(component(name).__module__)
    checks: Mapping[str, Callable[[], None]] = getattr(module, "OPTIONAL", {})
    checks.get(name.partition(".")[2], lambda: None)()


def generates(step: Step) -> bool:
    """Whether a step makes speech of its own, at most as long as the wave that it is given, and needs nothing of it."""
    return getattr(step, "generates", False)


def to_json(step: Step) -> dict[str, Any]:
    """A step as JSON values: `{"step": "codecs.Opus", "bitrate_bps": 16000, ...}`."""
    family = type(step).__module__.removeprefix(f"{__name__}.")
    return {"step": f"{family}.{type(step).__name__}", **asdict(step)}  # type: ignore[call-overload]


def from_json(value: dict[str, Any]) -> Step:
    """The inverse of `to_json`, also after a round through JSON text (lists become tuples).

    Raises `ValueError` for a step or parameter that this version does not know.
    """
    parameters = {key: _tuples(v) for key, v in value.items() if key != "step"}
    kind = _find(value["step"])
    try:
        if not is_dataclass(kind) or not hasattr(kind, "apply"):
            raise TypeError(f"{value['step']} is no step")
        step: Step = kind(**parameters)  # type: ignore[assignment, operator]
    except TypeError as error:
        raise ValueError(f"{value} was written by another version of speechdistill: {error}") from error
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
        raise ValueError(f"degradation {name!r} is not part of this version; its families are {_families()}")
    module = import_module(f"{__name__}.{family}")
    found = getattr(module, member, None)
    # Names come from shards too: only what the family itself defines may be called.
    if member.startswith("_") or getattr(found, "__module__", None) != module.__name__:
        raise ValueError(f"degradation {name!r} is not part of this version: {family} has no {member}")
    return found


@lru_cache(maxsize=1)  # it looks through the folder, and every plan asks
def _families() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
