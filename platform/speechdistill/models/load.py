"""Teachers by name or address, and any of them as a function of one recording.

A new teacher is one new file in `teachers/`: `load_teacher` finds it by name, and passes `head` and `compile` on if its
class takes them. `student` is any checkpoint of ours, by its address; `ensemble` the mean of several teachers.
"""

import importlib
import inspect
import pkgutil
from pathlib import Path
from typing import Any

import numpy as np

from speechdistill.io import audio
from speechdistill.io.audio_decoders import MAX_CHANNELS, SAMPLE_RATES
from speechdistill.io.errors import UserError
from speechdistill.models import teachers
from speechdistill.models.label import Teacher, Unscorable

_STUDENT, _ENSEMBLE = "student", "ensemble"  # their `weights` are in the name


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


def load_teacher(
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
    Raises `UserError` listing the names for an unknown one, `WeightsError` if weights are missing.
    """
    extra: dict[str, Any] = {key: value for key, value in {"head": head, "compile": compile}.items() if value}
    if name.startswith(f"{_ENSEMBLE}:"):
        if weights:
            raise UserError(f"teacher {name!r} takes no weights", "its members have the released ones, or are students")
        name, weights = _ENSEMBLE, name.removeprefix(f"{_ENSEMBLE}:")
        extra["load"] = lambda member: load_teacher(member, None, device, dtype, batch_s, hop_s).teacher
    elif name not in (*teacher_names(), _STUDENT):
        if not ("/" in name or Path(name).is_dir()):
            raise UserError(
                f"teacher {name!r} is unknown",
                f"choose from {teacher_names()}, or give a student: the folder of its checkpoint or "
                "models:/NAME@champion; or an ensemble: ensemble:distillmos=0.7,dnsmos_p808=0.3",
            )
        name, weights, extra = _STUDENT, name, extra | ({"encoder": weights} if weights else {})
    module = importlib.import_module(f"{teachers.__name__}.{name}")
    if unknown := extra.keys() - inspect.signature(module.Teacher).parameters.keys():
        raise UserError(f"teacher {name!r} takes no {' and no '.join(sorted(unknown))}", "leave it out")
    return Model(module.Teacher(weights=weights, device=device, dtype=dtype, batch_s=batch_s, hop_s=hop_s, **extra))


def teacher_names() -> list[str]:
    """The teachers that are there without an address."""
    return sorted({module.name for module in pkgutil.iter_modules(teachers.__path__)} - {_STUDENT, _ENSEMBLE})


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
