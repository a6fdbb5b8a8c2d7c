"""A degradation step: what it knows, what it does, and those that a trained network does.

A **step** is a frozen dataclass of JSON values with `apply(wave) -> wave`: float32, shape (num_samples,), 16 kHz,
the same length and alignment out as in. The families are in `degradations/`, their lookup in `components.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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

        Raises any exception for a file that is not such weights, `LibraryError` for a library that is missing.
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

    Raises `UserError` naming the source of weights that are missing, have changed or are none.
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
    """Whether a step makes speech of its own, at most as long as the wave that it is given, and needs nothing of it."""
    return getattr(step, "generates", False)
