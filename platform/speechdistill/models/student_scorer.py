"""Any student as a scorer of waves of any length: windows, batches, and faster convolutions for CPUs.

Memory does not grow with the length of the audio.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.models.device import on_device, torch_device
from speechdistill.models.networks.conv_transformer import SEGMENT_SAMPLES, ConvTransformer
from speechdistill.models.windowed import DTYPES, HOP_S, Windowed, check, segment_starts

_LONGEST_S = SEGMENT_SAMPLES / SAMPLE_RATE

# Measured: on a CPU one segment of 7.68 s at a time is fastest (8 take 1.3 times as long each) and smallest.
_BATCH_SEGMENTS = {"cpu": 1, "cuda": 32}
_FIRST_FLOAT32 = 2  # convolutions that stay in float32, as in the student: in bfloat16 they double its error


class Scorer(Windowed):
    """Labels waves by the mean score of windows about `hop_s` apart; see `models.label`.

    Windows are as long as the segments that the network was trained on, 7.68 s for the released one.
    `network` becomes the scorer's own: it is moved to `device`, put in evaluation mode, and on a CPU its convolutions
    are replaced. `name` and `weights_hash` are for provenance. `batch_s` bounds the seconds of audio in the network at
    once. bfloat16 scores of the released model are within 0.01 MOS of float32. On CUDA, float32 follows torch's own
    TF32 settings. `hop_s` is 1 s in the released model; up to 7.68 s, where windows touch, it is a fast mode for waves
    above 8.68 s: 2 windows instead of 4 for 10 s, 8 instead of 54 for 60 s (`benchmarks/score.py` prints what that does
    to the scores). Raises `UserError` for a wrong device, dtype, batch or hop.
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

    def _forward(self, windows: Sequence[np.ndarray]) -> Tensor:
        segments = np.zeros((len(windows), self._segment), np.float32)
        for row, window in zip(segments, windows, strict=True):
            row[: len(window)] = window
        low = self._dtype is not torch.float32
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=low):
            logits: Tensor = self.network(on_device(segments, self._device))
            return logits.double()


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
