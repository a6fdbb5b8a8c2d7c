"""A teacher as a function of one recording, in any form that a caller has it."""

from typing import Any

import numpy as np

from speechdistill.io import audio
from speechdistill.io.audio_decoders import MAX_CHANNELS, SAMPLE_RATES
from speechdistill.models.label import Teacher, Unscorable


class Model:
    """A teacher as a function of one recording."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def __call__(self, wave: Any, sample_rate: int, reference: Any = None) -> float:
        """Return the MOS, 1 to 5, of a NumPy array or torch tensor, shape (num_samples,) or (num_samples, channels).

        Channels are averaged. Samples are floats, or signed integers as full-scale PCM, at any sample rate. `reference`
        is the clean original, which an intrusive teacher needs. Raises `Unscorable` for audio that cannot be scored and
        `ValueError` for arguments that are not audio.
        """
        if not SAMPLE_RATES.start <= sample_rate < SAMPLE_RATES.stop:
            raise ValueError(f"sample rate {sample_rate} Hz; choose {SAMPLE_RATES[0]} to {SAMPLE_RATES[-1]}")
        references = None if reference is None else [audio.resample(_mono(reference), sample_rate)]
        (label,) = self.teacher.label([audio.resample(_mono(wave), sample_rate)], references)
        if isinstance(label, Unscorable):
            raise label
        return label.score


def _mono(wave: Any) -> np.ndarray:
    """Return float32 samples, shape (num_samples,)."""
    if hasattr(wave, "detach"):  # a tensor, without importing torch; NumPy has no bfloat16
        wave = wave.detach().cpu()
        wave = (wave.float() if wave.is_floating_point() else wave).numpy()
    wave = np.asarray(wave)
    if wave.ndim not in (1, 2) or (wave.ndim == 2 and not 1 <= wave.shape[1] <= MAX_CHANNELS):
        raise ValueError(
            f"wave of shape {wave.shape}; expected (num_samples,) or (num_samples, channels), "
            f"at most {MAX_CHANNELS} channels (transpose one of shape (channels, num_samples))"
        )
    if wave.dtype.kind != "f" and wave.dtype not in (np.int16, np.int32):
        raise ValueError(f"wave of {wave.dtype}; expected floats in [-1, 1], int16 or int32")
    with np.errstate(over="ignore", invalid="ignore"):  # the result is infinite, which is reported
        mono = wave.mean(axis=1, dtype=np.float32) if wave.ndim == 2 else wave.astype(np.float32)
    full_scale = 1.0 if wave.dtype.kind == "f" else float(np.iinfo(wave.dtype).max + 1)
    return np.asarray(mono / np.float32(full_scale))
