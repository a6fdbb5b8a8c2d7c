"""Distill-MOS v7, the released student, as a teacher: 4.1 M parameters, MOS of speech at 16 kHz.

The weights come from the `distillmos` wheel (MIT), which is not imported: it needs torchaudio for its command
line only. Scores equal that package's, with memory that does not grow with the length of the audio.
"""

import hashlib
import importlib.util
import math
import pickle
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import torch

from speechdistill.audio import SAMPLE_RATE
from speechdistill.students.conv_transformer import SEGMENT_SAMPLES, ConvTransformer
from speechdistill.teachers import Label, Unscorable, problem, sigmoid

MAX_HOP_SAMPLES = 16_000
"""Windows of long audio start at most 1 s apart, as in the released model."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Measured: on a CPU one segment at a time is fastest (8 take 1.3 times as long each) and smallest.
_BATCH_SEGMENTS = {"cpu": 1, "cuda": 32}
_MISSING = "{}: no such weights file; `pip install --no-deps distillmos==0.9.1` brings it, or give its path"

Segment = tuple[np.ndarray, int]
"""A wave and the sample at which the segment starts."""


class Teacher:
    """Labels waves by the mean score of 7.68 s windows about 1 s apart; see `speechdistill.teachers`.

    `weights` is the path or URL of a file like the released one (default: from the installed wheel).
    `batch_s` bounds the seconds of audio in the network at once. bfloat16 scores are within 0.01 MOS of
    float32. On CUDA, float32 follows torch's own TF32 settings. Raises `FileNotFoundError` where there are no
    weights and `ValueError` for a wrong file, device, dtype or batch.
    """

    name = "distillmos"

    def __init__(
        self,
        weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
    ) -> None:
        if dtype not in _DTYPES:
            raise ValueError(f"dtype {dtype!r}; choose from {list(_DTYPES)}")
        if batch_s is not None and not batch_s > 0:
            raise ValueError(f"batch_s {batch_s}; seconds of audio, above 0")
        self._dtype = _DTYPES[dtype]
        self._device = _device(device)
        default = _BATCH_SEGMENTS.get(self._device.type, 1)
        segments_s = SEGMENT_SAMPLES / SAMPLE_RATE
        self._batch = default if batch_s is None else max(1, math.floor(batch_s / segments_s + 1e-6))
        path = weights or _released_weights()
        data = _read(path)
        self.weights_hash = hashlib.sha256(data).hexdigest()
        self.network = _network(data, path).to(self._device)

    def label(self, waves: Sequence[np.ndarray]) -> list[Label | Unscorable]:
        """One result per wave; waves are mono float32 at 16 kHz of any lengths, memory maps too."""
        problems = [problem(wave) for wave in waves]
        good = [wave for wave, why in zip(waves, problems, strict=True) if why is None]
        labels = (Label.from_logits(logits) for logits in self._logits(good))
        return [why or next(labels) for why in problems]

    def timeline(self, wave: np.ndarray) -> list[tuple[float, float | None]]:
        """(start in s, score) for each second: the score of the window whose centre is nearest its middle.

        The windows are those that `label` averages. The score is None where the window is silent. Raises
        `Unscorable` for a wave that cannot be judged.
        """
        if why := problem(wave):
            raise why
        starts = segment_starts(len(wave))
        (logits,) = self._logits([wave])
        scores = [
            None if problem(wave[start : start + SEGMENT_SAMPLES]) else float(1 + 4 * quality)
            for start, quality in zip(starts, sigmoid(logits), strict=True)
        ]
        centres = np.array(starts) + SEGMENT_SAMPLES / 2
        begins = range(0, len(wave), SAMPLE_RATE)
        middles = [(begin + min(begin + SAMPLE_RATE, len(wave))) / 2 for begin in begins]
        nearest = [int(np.abs(centres - middle).argmin()) for middle in middles]
        return [(begin / SAMPLE_RATE, scores[i]) for begin, i in zip(begins, nearest, strict=True)]

    def _logits(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Per wave the logits of its segments, float64; the batches run across waves."""
        starts = [segment_starts(len(wave)) for wave in waves]
        segments = ((wave, start) for wave, of_wave in zip(waves, starts, strict=True) for start in of_wave)
        logits = [self._forward(batch) for batch in _batches(segments, self._batch)]
        ends = np.cumsum([len(of_wave) for of_wave in starts])
        return np.split(np.concatenate(logits), ends[:-1]) if logits else []

    def _forward(self, batch: Sequence[Segment]) -> np.ndarray:
        segments = np.zeros((len(batch), SEGMENT_SAMPLES), np.float32)
        for row, (wave, start) in zip(segments, batch, strict=True):
            part = wave[start : start + SEGMENT_SAMPLES]
            row[: len(part)] = part
        low = self._dtype is not torch.float32
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=low):
            logits = self.network(torch.from_numpy(segments).to(self._device))
        return np.asarray(logits.cpu().numpy(), np.float64)


def segment_starts(num_samples: int) -> list[int]:
    """First samples of the windows over a wave, as the released model places them: evenly, at most 1 s apart.

    A wave of up to one window has one, which is zero-padded at the end.
    """
    over = max(0, num_samples - SEGMENT_SAMPLES)
    return [int(place * over) for place in np.linspace(0, 1, math.ceil(over / MAX_HOP_SAMPLES) + 1)]


def _batches(segments: Iterable[Segment], size: int) -> Iterator[list[Segment]]:
    stream = iter(segments)
    while batch := list(islice(stream, size)):
        yield batch


def _device(name: str | None) -> torch.device:
    available = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if available else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown to torch; choose cpu, cuda or cuda:<index>") from error
    if device.type == "cuda" and not available:
        raise ValueError(f"device {name!r}: this torch finds no CUDA device; choose cpu")
    return device


def _released_weights() -> str:
    spec = importlib.util.find_spec("distillmos")  # finds the package without importing it
    folder = Path(spec.origin).parent if spec and spec.origin else Path("distillmos")
    return str(folder / "weights" / "distill_mos_v7.pt")


def _read(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError as error:
        raise FileNotFoundError(_MISSING.format(path)) from error


def _network(data: bytes, path: str) -> ConvTransformer:
    network = ConvTransformer()
    try:
        network.load_state_dict(torch.load(BytesIO(data), map_location="cpu", weights_only=True)["model"])
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise ValueError(f"{path}: not Distill-MOS v7 weights ({reason})") from error
    # Channels last: 1.2 times as fast in float32 on a CPU, twice in bfloat16; the scores are the same.
    network.cnn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.eval()
