"""Over-suppression of the wanted speaker: frames whose spectrum an enhancer has weakened too much (TSOS).

Eskimez et al. 2022, section 4.1, after "Personalized speech enhancement: new models and comprehensive evaluation"
(2021); power, threshold and form are those on which public implementations agree.
"""

from typing import NamedTuple

import numpy as np

POWER = 0.3
"""Exponent of magnitudes, as in the loss."""

THRESHOLD = 0.1
LEVEL_DBFS = -25.0
"""Level of the reference. The published form compares different powers, so its result depends on the level."""

_WINDOW, _HOP = 512, 256  # samples at 16 kHz: 32 ms and 16 ms


class Oversuppression(NamedTuple):
    """Shares of over-suppressed frames, 0 to 1, and the same as seconds in half an hour.

    `level_free` uses the same power on both sides: uniform attenuation counts beyond 11.0 dB at any level.
    """

    share: float
    level_free: float

    @property
    def seconds_per_half_hour(self) -> float:
        return self.share * 1800


def oversuppression(reference: np.ndarray, estimate: np.ndarray) -> Oversuppression:
    """Compare an estimate with the clean speech of the wanted speaker, both (num_samples,) at 16 kHz.

    Both are scaled by the gain that brings the reference to -25 dBFS RMS. A silent reference has no over-suppressed
    frame. Raises `ValueError` for waves of other shapes.
    """
    if reference.ndim != 1 or reference.shape != estimate.shape or not len(reference):
        raise ValueError(f"waves of {reference.shape} and {estimate.shape}; expected (num_samples,) twice")
    gain = _gain(reference.astype(np.float64))
    clean, enhanced = (_compressed(gain * wave.astype(np.float64)) for wave in (reference, estimate))
    lost = (np.maximum(clean - enhanced, 0) ** 2).sum(axis=1)
    over, level_free = (lost > THRESHOLD * total.sum(axis=1) for total in (clean, clean**2))
    return Oversuppression(float(over.mean()), float(level_free.mean()))


def _gain(reference: np.ndarray) -> float:
    rms = float(np.sqrt(np.mean(reference**2)))
    return 10 ** (LEVEL_DBFS / 20) / rms if rms else 1.0


def _compressed(wave: np.ndarray) -> np.ndarray:
    """Magnitudes to the power 0.3, (frames, 257), of centred Hann windows."""
    padded = np.pad(wave, _WINDOW // 2, mode="reflect" if len(wave) > _WINDOW // 2 else "constant")
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[::_HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
    return np.asarray(np.abs(np.fft.rfft(frames * hann)) ** POWER)
