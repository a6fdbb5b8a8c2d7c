"""Any student as a scorer of waves of any length: windows, batches, and faster convolutions for CPUs.

Memory does not grow with the length of the audio. What a teacher says of a wave is `speechdistill.teachers`' contract;
`Windowed` is what all teachers that judge a wave by its windows have in common.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor, nn

from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.students.conv_transformer import SEGMENT_SAMPLES, ConvTransformer
from speechdistill.teachers import Label, Unscorable, problem, sigmoid

HOP_S = 1.0
"""Windows of long audio start at most so far apart in the released model."""

_LONGEST_S = SEGMENT_SAMPLES / SAMPLE_RATE

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Measured: on a CPU one segment of 7.68 s at a time is fastest (8 take 1.3 times as long each) and smallest.
_BATCH_SEGMENTS = {"cpu": 1, "cuda": 32}
_FIRST_FLOAT32 = 2  # convolutions that stay in float32, as in the student: in bfloat16 they double its error


class Windowed:
    """Labels waves by the mean score of their windows; a teacher gives `_starts`, `_window` and `_forward`.

    `_segment` is the samples of a window, `_batch` how many go through the network at once.
    """

    name: str
    weights_hash: str
    intrusive = False
    _segment: int
    _batch: int

    def label(
        self, waves: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None
    ) -> list[Label | Unscorable]:
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
        starts = self._starts(wave)
        (logits,) = self._logits([wave])
        scores = [
            None if problem(self._window(wave, start)) else float(1 + 4 * quality)
            for start, quality in zip(starts, sigmoid(logits), strict=True)
        ]
        centres = np.array(starts) + self._segment / 2
        begins = range(0, len(wave), SAMPLE_RATE)
        middles = [(begin + min(begin + SAMPLE_RATE, len(wave))) / 2 for begin in begins]
        nearest = [int(np.abs(centres - middle).argmin()) for middle in middles]
        return [(begin / SAMPLE_RATE, scores[i]) for begin, i in zip(begins, nearest, strict=True)]

    def _starts(self, wave: np.ndarray) -> list[int]:
        """First samples of a wave's windows, at least one."""
        raise NotImplementedError

    def _window(self, wave: np.ndarray, start: int) -> np.ndarray:
        return wave[start : start + self._segment]

    def _forward(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        """The logits of up to `_batch` windows, float64; a window may be shorter than `_segment`."""
        raise NotImplementedError

    def _logits(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Per wave the logits of its windows; the batches run across waves, those of like length together."""
        order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
        starts = [self._starts(waves[i]) for i in order]
        windows = (self._window(waves[i], start) for i, its in zip(order, starts, strict=True) for start in its)
        logits = [self._forward(batch) for batch in _batches(windows, self._batch)]
        if not logits:
            return []
        ends = np.cumsum([len(its) for its in starts])
        of_wave = dict(zip(order, np.split(np.concatenate(logits), ends[:-1]), strict=True))
        return [of_wave[i] for i in range(len(waves))]


class Scorer(Windowed):
    """Labels waves by the mean score of windows about `hop_s` apart; see `speechdistill.teachers`.

    Windows are as long as the segments that the network was trained on, 7.68 s for the released one.
    `network` becomes the scorer's own: it is moved to `device`, put in evaluation mode, and on a CPU its convolutions
    are replaced. `name` and `weights_hash` are for provenance. `batch_s` bounds the seconds of audio in the network at
    once. bfloat16 scores of the released model are within 0.01 MOS of float32. On CUDA, float32 follows torch's own
    TF32 settings. `hop_s` is 1 s in the released model; up to 7.68 s, where windows touch, it is a fast mode for waves
    above 8.68 s: 2 windows instead of 4 for 10 s, 8 instead of 54 for 60 s (`benchmarks/score.py` prints what that does
    to the scores). Raises `ValueError` for a wrong device, dtype, batch or hop.
    """

    def __init__(
        self,
        network: ConvTransformer,
        name: str,
        weights_hash: str,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
        hop_s: float = HOP_S,
    ) -> None:
        check(dtype, batch_s, hop_s)
        self.name, self.weights_hash = name, weights_hash
        self._dtype = DTYPES[dtype]
        self._device = torch_device(device)
        self._segment = network.config.segment_samples
        at_once_s = batch_s or _BATCH_SEGMENTS.get(self._device.type, 1) * _LONGEST_S
        self._batch = max(1, math.floor(at_once_s * SAMPLE_RATE / self._segment + 1e-6))
        self._hop = min(max(1, round(hop_s * SAMPLE_RATE)), self._segment)  # every sample is heard
        self.network = network.to(self._device).eval()
        if self._device.type == "cpu" and _has_fused(self._dtype):
            self.network.add_module("cnn", _FastConvolutions(self.network, self._dtype))

    def _starts(self, wave: np.ndarray) -> list[int]:
        return segment_starts(len(wave), self._hop, self._segment)

    def _forward(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        segments = np.zeros((len(windows), self._segment), np.float32)
        for row, window in zip(segments, windows, strict=True):
            row[: len(window)] = window
        low = self._dtype is not torch.float32
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=low):
            logits = self.network(torch.from_numpy(segments).to(self._device))
        return np.asarray(logits.cpu().numpy(), np.float64)


def segment_starts(
    num_samples: int, hop: int = round(HOP_S * SAMPLE_RATE), segment_samples: int = SEGMENT_SAMPLES
) -> list[int]:
    """First samples of the windows over a wave, as the released model places them: evenly, at most `hop` apart.

    A wave of up to one window has one, which is zero-padded at the end.
    """
    over = max(0, num_samples - segment_samples)
    return [int(place * over) for place in np.linspace(0, 1, math.ceil(over / hop) + 1)]


class _FastConvolutions(nn.Module):
    """The student's convolutions on a CPU, for inference: the same maps in less time.

    Activations are part of the convolutions. Frames of digital silence at the end, with which short waves are
    padded, are computed once. In bfloat16 the last convolution takes part too, where the student leaves it out.
    """

    def __init__(self, student: ConvTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        stages = list(student.cnn.cnn)
        dtypes = [*[torch.float32] * _FIRST_FLOAT32, *[dtype] * (len(stages) // 2 - _FIRST_FLOAT32)]
        fused = map(_FusedConvolution, stages[::2], stages[1::2], dtypes)
        self._convolutions = nn.Sequential(*fused)
        self._reach = len(self._convolutions)  # a frame sees so many on each side: each kernel of 3 adds one

    def forward(self, maps: Tensor) -> Tensor:
        """(batch, 2, 161, frames), frames even, to (batch, channels, bins, frames / 2) float32."""
        sounding = maps.abs().amax(dim=(0, 1, 2)).nonzero()
        end = int(sounding[-1]) + 1 if len(sounding) else 0
        silent = -(-(end + self._reach) // 2)  # the first output frame that sees silence alone
        kept = 2 * (silent + self._reach // 2 + 1)  # which does not see the padding at the end either
        out: Tensor = self._convolutions(maps[..., :kept]).float()
        missing = (maps.shape[-1] - kept) // 2
        if missing <= 0:
            return out
        frame = out[..., silent : silent + 1]
        return torch.cat([out[..., :silent], frame.expand(*frame.shape[:-1], missing), out[..., silent:]], dim=-1)


class _FusedConvolution(nn.Module):
    """A convolution and its LeakyReLU as one call, which saves a pass over the maps (a sixth of the time in bfloat16).

    torch has it for its compiler only, hence the private name.
    """

    def __init__(self, convolution: nn.Module, activation: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(convolution, nn.Conv2d) and isinstance(activation, nn.LeakyReLU)
        assert convolution.bias is not None
        self._weight, self._bias = convolution.weight.detach().to(dtype), convolution.bias.detach().to(dtype)
        self._geometry = (convolution.padding, convolution.stride, convolution.dilation, convolution.groups)
        self._slope = activation.negative_slope

    def forward(self, maps: Tensor) -> Tensor:
        maps = maps.to(self._weight.dtype).contiguous(memory_format=torch.channels_last)
        call = torch.ops.mkldnn._convolution_pointwise
        out: Tensor = call(maps, self._weight, self._bias, *self._geometry, "leaky_relu", [self._slope], "")
        return out


def _has_fused(dtype: torch.dtype) -> bool:
    if not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _batches(windows: Iterable[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    stream = iter(windows)
    while batch := list(islice(stream, size)):
        yield batch


def check(dtype: str, batch_s: float | None, hop_s: float, longest_s: float = _LONGEST_S) -> None:
    """Raise `ValueError` for a dtype, batch or hop that a teacher with windows of `longest_s` cannot take."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r}; choose from {list(DTYPES)}")
    if batch_s is not None and not batch_s > 0:
        raise ValueError(f"batch_s {batch_s}; seconds of audio, above 0")
    if not 0 < hop_s <= longest_s:
        raise ValueError(f"hop_s {hop_s}; choose seconds above 0 and up to {longest_s} (released: {HOP_S})")


def torch_device(name: str | None) -> torch.device:
    """The device of a name, without one CUDA where there is one; raises `ValueError` for a device that is not there."""
    available = torch.cuda.is_available()
    try:
        device = torch.device(name or ("cuda" if available else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device {name!r} is unknown to torch; choose cpu, cuda or cuda:<index>") from error
    if device.type == "cuda" and not available:
        raise ValueError(f"device {name!r}: this torch finds no CUDA device; choose cpu")
    return device
