"""The contract of a teacher: a model that scores the quality of speech."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np

from speechdistill.io.audio import MIN_DURATION_S, SAMPLE_RATE
from speechdistill.metrics import logistic

if TYPE_CHECKING:  # torch stays out of the import
    from speechdistill.models.parameters import Parameters

SILENCE_PEAK = 1e-4  # -80 dBFS: networks normalise the peak, and would score dither and rounding below it
_BLOCK_SAMPLES = 1 << 20
_MARGIN = 1e-6  # of the range of MOS


class Unscorable(ValueError):
    """Audio that cannot be scored; the message is the reason."""


class Label(NamedTuple):
    """A teacher's score of one wave.

    `score` is the MOS from 1 to 5, `logit` is log(p / (1 - p)) of p = (score - 1) / 4. `disagreement` is the standard
    deviation of the windows' scores, None for a single window; for an ensemble, of the members' scores.
    """

    score: float
    logit: float
    disagreement: float | None

    @classmethod
    def from_logits(cls, logits: np.ndarray) -> Self:
        """Average the scores of a wave's windows, given their logits of shape (windows,)."""
        qualities = logistic.sigmoid(logits)
        quality = float(qualities.mean())
        bounded = min(max(quality, math.ulp(1.0)), 1 - math.ulp(1.0))  # keeps the logit of a saturated network finite
        disagreement = 4 * float(qualities.std()) if len(qualities) > 1 else None
        # By `math`, not `logistic.logits`: labels on disk have these bits.
        return cls(1 + 4 * quality, math.log(bounded) - math.log1p(-bounded), disagreement)


class Teacher(Protocol):
    """A model that labels waves.

    `weights_hash` is the sha256 of the weights file, or of the tensors that were read. An `intrusive` teacher compares
    each wave with its clean reference.
    """

    name: str
    weights_hash: str
    intrusive: bool

    def label(
        self, waves: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None
    ) -> list[Label | Unscorable]:
        """Return one result per wave, in order; waves are mono float32 at 16 kHz of any lengths.

        The result of a wave that cannot be scored (`problem`) is the reason, so that the rest of the batch is kept.
        Raises `ValueError` if the teacher is intrusive and there are no references; other teachers ignore them.
        """
        ...

    def timeline(self, wave: np.ndarray) -> list[tuple[float, float | None]]:
        """Return the start in seconds and the score of each second of audio."""
        ...

    def parameters(self) -> "Parameters | None":
        """Count the network's parameters; None if the teacher is not a torch network."""
        ...


def problem(wave: np.ndarray) -> Unscorable | None:
    """Return the reason why a mono wave at 16 kHz cannot be scored, or None; reads blocks of a memory map."""
    if wave.ndim != 1:
        raise ValueError(f"wave of shape {wave.shape}; a teacher takes mono waves, shape (num_samples,)")
    if len(wave) == 0:
        return Unscorable("no samples")
    if len(wave) < MIN_DURATION_S * SAMPLE_RATE:
        return Unscorable(f"{len(wave) / SAMPLE_RATE:.3f} s is shorter than {MIN_DURATION_S} s")
    peak = 0.0
    for start in range(0, len(wave), _BLOCK_SAMPLES):
        block_peak = float(np.abs(wave[start : start + _BLOCK_SAMPLES]).max())
        if not math.isfinite(block_peak):
            return Unscorable("NaN or infinite samples")
        peak = max(peak, block_peak)
    return Unscorable("silent (peak below -80 dBFS)") if peak < SILENCE_PEAK else None


def logits(scores: np.ndarray | float) -> np.ndarray:
    """Return the logits of MOS from 1 to 5, float64; scores are kept a millionth of the range from either end."""
    return logistic.logits(scores, _MARGIN)
