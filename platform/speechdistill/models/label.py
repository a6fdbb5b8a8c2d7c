"""The contract of a teacher, a model that scores how good speech sounds, and what all teachers share.

A teacher module, one file in `teachers/`, holds a class
`Teacher(weights=None, device=None, dtype="float32", batch_s=None, hop_s=1.0)` with

- `name: str` and `weights_hash: str`, the sha256 of the weights file, or of what was read of it, for provenance;
- the verb `label(waves, references=None) -> list[Label | Unscorable]`: mono float32 waves at 16 kHz of any lengths,
  one result per wave in their order. A wave that cannot be judged (`problem`) is reported, not raised, so that it does
  not lose the batch;
- `intrusive: bool`, whether it compares each wave with its clean original, one of `references`: then it raises
  `ValueError` if there are none. Others ignore them;
- `timeline(wave) -> list[tuple[float, float | None]]`: start in seconds and score for each second of audio.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol, Self

import numpy as np

from speechdistill.io.audio import MIN_DURATION_S, SAMPLE_RATE

SILENCE_PEAK = 1e-4  # -80 dBFS: networks normalise the peak, so below it they would judge dither and rounding
_BLOCK_SAMPLES = 1 << 20


class Unscorable(ValueError):
    """Audio that cannot be judged; the message is the reason."""


class Label(NamedTuple):
    """What a teacher says of one wave.

    `score` is the MOS from 1 to 5, `logit` is log(p / (1 - p)) of p = (score - 1) / 4, `disagreement` the
    standard deviation of the segments' scores, None where there is one segment; of an ensemble, of its members' scores.
    """

    score: float
    logit: float
    disagreement: float | None

    @classmethod
    def from_logits(cls, logits: np.ndarray) -> Self:
        """The label of a wave whose segments have these logits, shape (segments,): scores are averaged."""
        qualities = sigmoid(logits)
        quality = float(qualities.mean())
        bounded = min(max(quality, math.ulp(1.0)), 1 - math.ulp(1.0))  # a saturated network stays finite
        disagreement = 4 * float(qualities.std()) if len(qualities) > 1 else None
        return cls(1 + 4 * quality, math.log(bounded) - math.log1p(-bounded), disagreement)


class Teacher(Protocol):
    """The contract of the family; see the module docstring."""

    name: str
    weights_hash: str
    intrusive: bool

    def label(
        self, waves: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None
    ) -> list[Label | Unscorable]: ...

    def timeline(self, wave: np.ndarray) -> list[tuple[float, float | None]]: ...


def problem(wave: np.ndarray) -> Unscorable | None:
    """Why a mono wave at 16 kHz cannot be judged, or None; read in blocks, so a memory map stays on disk."""
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


def logits(scores: np.ndarray) -> np.ndarray:
    """Of MOS from 1 to 5, float64; what is at or beyond an end is brought a millionth of the range inside."""
    quality = np.clip((np.asarray(scores, np.float64) - 1) / 4, 1e-6, 1 - 1e-6)
    return np.asarray(np.log(quality) - np.log1p(-quality))


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """In float64, exact at both ends."""
    return np.exp(-np.logaddexp(0.0, -np.asarray(logits, np.float64)))
