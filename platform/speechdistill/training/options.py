"""The options that all commands which train have in common. (No import of torch, which `--help` does not need.)"""

from dataclasses import dataclass
from typing import Literal

from speechdistill.io.audio import SEGMENT_S
from speechdistill.io.options import OptionError, at_least


@dataclass(frozen=True, kw_only=True)
class Updates:
    """How the network is trained."""

    learning_rate: float = 2e-5
    """AdamW's."""
    batch_size: int = 20
    """Samples in the global batch, whatever the number of workers."""
    checkpoint_every_s: float = 300.0
    """Seconds between checkpoints: what a killed worker costs at most."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the training; bfloat16: mixed precision."""
    seed: int = 0
    """Decides batches and initial weights."""

    def __post_init__(self) -> None:
        at_least(self, batch_size=1, checkpoint_every_s=0, seed=0)
        if not self.learning_rate > 0:
            raise OptionError(f"--learning-rate is {self.learning_rate:g}", "it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Lengths in training."""

    crop_s: float = SEGMENT_S
    """Seconds of each sample that are trained on, at most 7.68; shorter is faster."""

    def __post_init__(self) -> None:
        if not self.crop_s > 0:
            raise OptionError(f"--crop-s is {self.crop_s:g}", "it must be above 0")


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long the network is trained."""

    steps: int = 250_000
    """Updates."""
    validate_every: int = 5_000
    """Steps between validations."""

    def __post_init__(self) -> None:
        at_least(self, steps=1, validate_every=1)
