"""Teachers: models that say how good speech sounds. One file per teacher; its name is the file's name.

A teacher module holds a class `Teacher(weights=None, device=None, dtype="float32", batch_s=None, hop_s=1.0)` with

- `name: str` and `weights_hash: str`, the sha256 of the weights file, or of what was read of it, for provenance;
- the verb `label(waves, references=None) -> list[Label | Unscorable]`: mono float32 waves at 16 kHz of any lengths,
  one result per wave in their order. A wave that cannot be judged (`problem`) is reported, not raised, so that it does
  not lose the batch;
- `intrusive: bool`, whether it compares each wave with its clean original, one of `references`: then it raises
  `ValueError` where there are none. Others have no use for them;
- `timeline(wave) -> list[tuple[float, float | None]]`: start in seconds and score for each second of audio.

A new teacher is one new file: `load` finds it by name, and passes `head` and `compile` on where its class takes them.
`student` is any student of ours, by the address of its weights; `ensemble` the mean of several teachers.
"""

import importlib
import inspect
import math
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self

import numpy as np

from speechdistill.io import audio
from speechdistill.io.audio_decoders import MAX_CHANNELS, SAMPLE_RATES

MIN_DURATION_S = 0.1
SILENCE_PEAK = 1e-4  # -80 dBFS: networks normalise the peak, so below it they would judge dither and rounding
_BLOCK_SAMPLES = 1 << 20
_STUDENT, _ENSEMBLE = "student", "ensemble"  # their `weights` are in the name


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
    """The contract of the family, see the module's text."""

    name: str
    weights_hash: str
    intrusive: bool

    def label(
        self, waves: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None
    ) -> list[Label | Unscorable]: ...

    def timeline(self, wave: np.ndarray) -> list[tuple[float, float | None]]: ...


class Model:
    """A teacher as a function of one recording."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher

    def __call__(self, wave: Any, sample_rate: int, reference: Any = None) -> float:
        """The MOS, 1 to 5, of a NumPy array or torch tensor, shape (num_samples,) or (num_samples, channels).

        Channels are averaged; any sample rate; floats, or signed integers as full-scale PCM. `reference` is the clean
        original, which an intrusive teacher needs. Raises `Unscorable` for audio that cannot be judged and
        `ValueError` for arguments that are not audio.
        """
        if not SAMPLE_RATES.start <= sample_rate < SAMPLE_RATES.stop:
            raise ValueError(f"sample rate {sample_rate} Hz; choose {SAMPLE_RATES[0]} to {SAMPLE_RATES[-1]}")
        references = None if reference is None else [audio.resample(_mono(reference), sample_rate)]
        (label,) = self.teacher.label([audio.resample(_mono(wave), sample_rate)], references)
        if isinstance(label, Unscorable):
            raise label
        return label.score


def load(
    name: str,
    weights: str | None = None,
    device: str | None = None,
    dtype: str = "float32",
    batch_s: float | None = None,
    hop_s: float = 1.0,
    head: str | None = None,
    compile: bool = False,
) -> Model:
    """The teacher called `name` as a `Model`; `.teacher` is the teacher itself.

    `name` may be the address of what was trained here: the folder of a checkpoint, a URL, `models:/NAME@champion`,
    `models:/NAME/3` or `runs:/ID/student`, the latter three at MLFLOW_TRACKING_URI; or `ensemble:NAME=0.7,NAME=0.3`,
    the weighted mean of teachers with their released weights, or of what was trained here. `weights` is a file or
    folder (default: the released ones; of a trained head its encoder, default: where it was in training), `device` a
    torch device (default: CUDA where there is one), `dtype` float32 or bfloat16, `batch_s` the seconds of audio that go
    through the network at once, `hop_s` the most seconds from one window of long audio to the next: above 1 it is
    faster and not exact. `head` and `compile` are for teachers that have them (xlsr): the file of the head above the
    encoder, and whether `torch.compile` makes the network faster.
    Raises `ValueError` listing the names for an unknown one, `FileNotFoundError` where weights are missing.
    """
    extra = {key: value for key, value in {"head": head, "compile": compile}.items() if value}
    if name.startswith(f"{_ENSEMBLE}:"):
        if weights:
            raise ValueError(f"teacher {name!r} takes no weights; its members have the released ones, or are students")
        name, weights = _ENSEMBLE, name.removeprefix(f"{_ENSEMBLE}:")
    elif name not in (*names(), _STUDENT):
        if not ("/" in name or Path(name).is_dir()):
            raise ValueError(
                f"teacher {name!r} is unknown; choose from {names()}, or give a student: the folder of its checkpoint "
                "or models:/NAME@champion; or an ensemble: ensemble:distillmos=0.7,dnsmos_p808=0.3"
            )
        name, weights, extra = _STUDENT, name, extra | ({"encoder": weights} if weights else {})
    module = importlib.import_module(f"{__name__}.{name}")
    if unknown := extra.keys() - inspect.signature(module.Teacher).parameters.keys():
        raise ValueError(f"teacher {name!r} takes no {' and no '.join(sorted(unknown))}")
    return Model(module.Teacher(weights=weights, device=device, dtype=dtype, batch_s=batch_s, hop_s=hop_s, **extra))


def names() -> list[str]:
    """The teachers that are there without an address."""
    return sorted({module.name for module in pkgutil.iter_modules(__path__)} - {_STUDENT, _ENSEMBLE})


def problem(wave: np.ndarray) -> Unscorable | None:
    """Why a mono wave at 16 kHz cannot be judged, or None; read in blocks, so a memory map stays on disk."""
    if wave.ndim != 1:
        raise ValueError(f"wave of shape {wave.shape}; a teacher takes mono waves, shape (num_samples,)")
    if len(wave) == 0:
        return Unscorable("no samples")
    if len(wave) < MIN_DURATION_S * audio.SAMPLE_RATE:
        return Unscorable(f"{len(wave) / audio.SAMPLE_RATE:.3f} s is shorter than {MIN_DURATION_S} s")
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


def _mono(wave: Any) -> np.ndarray:
    """float32, shape (num_samples,)."""
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
    with np.errstate(over="ignore", invalid="ignore"):  # becomes infinite, which is reported
        mono = wave.mean(axis=1, dtype=np.float32) if wave.ndim == 2 else wave.astype(np.float32)
    full_scale = 1.0 if wave.dtype.kind == "f" else float(np.iinfo(wave.dtype).max + 1)
    return np.asarray(mono / np.float32(full_scale))
