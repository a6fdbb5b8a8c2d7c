"""Degradation steps, the components that draw them, and steps that run a trained network.

A **step** is a frozen dataclass of JSON values with `apply(wave) -> wave`: float32, shape (num_samples,), 16 kHz.
Length and alignment stay the same. A **component** draws the parameters of a step and opens no audio. The families are
in `degradations/`, the look-up by name in `components.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from speechdistill.data.clips import Clips
from speechdistill.io import assets
from speechdistill.io.assets import Asset, Need
from speechdistill.io.errors import UserError


@dataclass(frozen=True)
class Scene:
    """Input of a component: the speech segment, the available clips and the settings of the recipe."""

    clip_id: str
    speaker: str | None
    num_samples: int
    clips: Clips
    _: KW_ONLY
    snr_mean_db: float = 10.0
    snr_sigma_db: float = 10.0
    assets: Mapping[str, Asset] = field(default_factory=dict)


def _no_check() -> None:
    """Accept every installation."""


class Step(Protocol):
    """A degradation with all its parameters."""

    def apply(self, wave: np.ndarray) -> np.ndarray: ...

    def clip_ids(self) -> tuple[str, ...]:
        """Return the clips of the manifest that the step reads, such as a noise recording."""


@dataclass(frozen=True)
class Component:
    """An entry of a degradation family, such as `opus = Component(_draw_opus, Opus)`.

    `step` is the type of the steps that `draw` returns, or several types. A type that runs a network (`Neural`) must be
    the only one, since samples are scheduled by it. `needs` are assets: trained weights or texts. `libraries` are
    packages whose version affects the output. `check` raises `LibraryError` if an optional library is missing.
    """

    draw: Callable[[np.random.Generator, Scene], Step]
    step: type[Step] | tuple[type[Step], ...]
    _: KW_ONLY
    needs: tuple[Need, ...] = ()
    libraries: tuple[str, ...] = ()
    check: Callable[[], object] = _no_check

    def __post_init__(self) -> None:
        if isinstance(self.step, tuple) and any(issubclass(kind, Neural) for kind in self.step):
            raise TypeError(f"{self.step}: a component that draws a step with a network draws no other type")

    @property
    def network(self) -> "type[Neural] | None":
        """The type of the drawn steps if they run a network, otherwise None."""
        return self.step if isinstance(self.step, type) and issubclass(self.step, Neural) else None


@dataclass(frozen=True)
class Neural(ABC):
    """A step that runs a trained network. `weights` and `sha256` are an `Asset` and precede the step's own parameters.

    Equal steps process waves of equal length in one batch, which changes the output by 1e-4 at most.
    """

    need: ClassVar[Need]
    """The weights of the network."""

    weights: str
    sha256: str

    @classmethod
    @abstractmethod
    def load(cls, path: Path, device: str) -> Any:
        """Load the network from a local file or folder onto a torch device, without gradients.

        Raises any exception for a file without the right weights, `LibraryError` if a library is missing.
        """

    @abstractmethod
    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        """Process waves of shape (batch, num_samples), float32 at 16 kHz; shape and order stay the same."""

    def apply(self, wave: np.ndarray) -> np.ndarray:
        result: np.ndarray = apply_batch(self, wave[None])[0]
        return result

    def clip_ids(self) -> tuple[str, ...]:
        return ()


def apply_together(
    steps: Sequence[Neural], waves: Sequence[np.ndarray], last: Sequence[bool]
) -> list[np.ndarray | Exception]:
    """Return `steps[i].apply(waves[i])` for each i, in batches on a GPU. If a batch fails, retry its waves one by one.

    Only a step that is the `last` of its plan shares a batch: a following codec would amplify differences of 1e-7. On a
    CPU batches are not faster, and without them each sample is bit-equal whatever it is processed with. Raises the same
    errors as `loaded`.
    """
    groups: dict[tuple[Neural, int, int], list[int]] = {}
    for i, (step, wave) in enumerate(zip(steps, waves, strict=True)):
        alone = not last[i] or _device() != "cuda"
        groups.setdefault((step, len(wave), i if alone else -1), []).append(i)
    results: list[np.ndarray | Exception] = [np.empty(0)] * len(waves)
    for (step, *_), members in groups.items():
        loaded(
            type(step), Asset(step.weights, step.sha256)
        )  # raises for unusable weights, which are no fault of a wave
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
    """Apply a step to waves of one length, shape (batch, num_samples)."""
    import torch

    network = loaded(type(step), Asset(step.weights, step.sha256))
    # With TF32, the default of cuDNN, results of different batches would differ by more than 1e-4.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return step.apply_batch(network, waves)


@lru_cache(maxsize=32)
def loaded(kind: type[Neural], asset: Asset) -> Any:
    """Load the network of a type of steps, on a GPU if there is one, and keep it for this process.

    Raises `UserError` naming the source if the weights are missing, changed or not of this network.
    """
    path = assets.local(kind.need, asset)
    try:
        return kind.load(path, _device())
    except ImportError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        fix = f"get it from {kind.need.where} and give --assets {kind.need.name} PATH"
        raise UserError(f"{asset.source} is not {kind.need.what}: {reason}", fix) from error


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def generates(step: Step) -> bool:
    """Return whether a step generates speech instead of transforming its input.

    The output may be shorter than the input, never longer.
    """
    return getattr(step, "generates", False)
