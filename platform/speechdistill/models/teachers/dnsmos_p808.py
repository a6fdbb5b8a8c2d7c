"""DNSMOS P.808 (Reddy, Gopal and Cutler 2021): the MOS of an absolute category rating."""

from functools import lru_cache

import numpy as np

from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.models import dnsmos
from speechdistill.models.dnsmos import Run
from speechdistill.models.options import TeacherOptions
from speechdistill.models.windowed import WindowScorer

FILE = "dnsmos_models/model_v8.onnx"
_WINDOW, _HOP, _MELS = 321, 160, 120  # the wheel's, whose window is odd
_DYNAMICS_DB = 80.0
_DEFAULTS = TeacherOptions()


def load(options: TeacherOptions = _DEFAULTS) -> WindowScorer:
    """Load the overall quality, the wheel's `p808_mos`; see `dnsmos.scorer`."""
    return dnsmos.scorer("dnsmos_p808", FILE, _scores, options)


def _scores(run: Run, windows: np.ndarray) -> np.ndarray:
    return run(np.stack([log_mels(window[:-_HOP]) for window in windows]))[:, 0]


def log_mels(wave: np.ndarray) -> np.ndarray:
    """Map (num_samples,) to mels (num_samples // 160, 120) float32 in dB: 1 at the loudest, -1 at 80 dB below it."""
    edge = _WINDOW // 2
    frames = np.lib.stride_tricks.sliding_window_view(np.pad(wave, edge), _WINDOW)[::_HOP]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_WINDOW) / _WINDOW)
    power = np.abs(np.fft.rfft(frames * hann)) ** 2
    decibels = 10 * np.log10(np.maximum(power @ _filters(), 1e-10))
    relative = np.maximum(decibels - decibels.max(), -_DYNAMICS_DB)
    return np.asarray((relative + 40) / 40, np.float32)


@lru_cache(maxsize=1)
def _filters() -> np.ndarray:
    """Return Slaney's mel bands, (161, 120), each of area 1, for an odd window (transformers' are for an even one)."""
    bins = np.fft.rfftfreq(_WINDOW, 1 / SAMPLE_RATE)
    edges = _hz(np.linspace(0, _mel(SAMPLE_RATE / 2), _MELS + 2))
    low, mid, high = edges[:-2], edges[1:-1], edges[2:]
    rising, falling = (bins[:, None] - low) / (mid - low), (high - bins[:, None]) / (high - mid)
    return np.asarray(np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low))


def _mel(hz: float) -> float:
    """Slaney's scale: linear to 1 kHz (mel 15), logarithmic above."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)


def _hz(mel: np.ndarray) -> np.ndarray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
