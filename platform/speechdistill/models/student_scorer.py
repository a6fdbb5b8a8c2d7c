"""A student as a teacher of waves of any length: windows, batches, and faster convolutions for CPUs.

Memory does not grow with the length of the audio.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from speechdistill.io.audio import SAMPLE_RATE, SEGMENT_S
from speechdistill.models.device import on_device, torch_device
from speechdistill.models.networks.conv_transformer import ConvTransformer
from speechdistill.models.options import TeacherOptions
from speechdistill.models.windowed import DTYPES, EvenWindows, WindowScorer

# Measured: on a CPU one segment of 7.68 s at a time is fastest (8 take 1.3 times as long each) and smallest.
_BATCH_SEGMENTS = {"cpu": 1, "cuda": 32}
_FIRST_FLOAT32 = 2  # convolutions that stay in float32, as in the student: in bfloat16 they double its error
_DEFAULTS = TeacherOptions()


def scorer(network: ConvTransformer, name: str, weights_hash: str, options: TeacherOptions = _DEFAULTS) -> WindowScorer:
    """Make a teacher of a student; `name` and `weights_hash` are for provenance.

    Windows are as long as the segments that the network was trained on, 7.68 s for the released model. The scorer takes
    `network` over: it moves to the device, and on a CPU its convolutions are replaced. bfloat16 scores of the released
    model are within 0.01 MOS of float32. On CUDA, float32 follows torch's own TF32 settings. With a hop of 7.68 s
    windows only touch, a fast mode for waves above 8.68 s: 2 windows instead of 4 for 10 s, 8 instead of 54 for 60 s
    (`benchmarks/score.py` prints the difference in scores). Raises `UserError` for a wrong device or hop.
    """
    length = network.config.segment_samples
    windows = EvenWindows(length=length, hop=min(options.hop(), length))  # no sample is skipped
    device = torch_device(options.device)
    batch = options.batch(_BATCH_SEGMENTS.get(device.type, 1) * SEGMENT_S, length / SAMPLE_RATE)
    return WindowScorer(name, weights_hash, windows, batch, StudentForward(network, device, DTYPES[options.dtype]))


class StudentForward:
    """A student as a function of windows, which are zero-padded to its segments."""

    def __init__(self, network: ConvTransformer, device: torch.device, dtype: torch.dtype) -> None:
        self.network = network.to(device).eval()
        self._device, self._dtype = device, dtype
        if device.type == "cpu" and _has_fused(dtype):
            self.network.add_module("cnn", _FastConvolutions(self.network, dtype))

    def __call__(self, windows: Sequence[np.ndarray]) -> Tensor:
        segments = np.zeros((len(windows), self.network.config.segment_samples), np.float32)
        for row, window in zip(segments, windows, strict=True):
            row[: len(window)] = window
        low = self._dtype is not torch.float32
        with torch.inference_mode(), torch.autocast(self._device.type, self._dtype, enabled=low):
            logits: Tensor = self.network(on_device(segments, self._device))
            return logits.double()


class _FastConvolutions(nn.Module):
    """Faster inference of the student's convolutions on a CPU, with the same maps.

    Activations are fused into the convolutions. Frames of digital silence at the end, the padding of short waves, are
    computed once. In bfloat16 the last convolution is included, unlike in the student.
    """

    def __init__(self, student: ConvTransformer, dtype: torch.dtype) -> None:
        super().__init__()
        stages = list(student.cnn.cnn)
        dtypes = [*[torch.float32] * _FIRST_FLOAT32, *[dtype] * (len(stages) // 2 - _FIRST_FLOAT32)]
        fused = map(_FusedConvolution, stages[::2], stages[1::2], dtypes)
        self._convolutions = nn.Sequential(*fused)
        self._reach = len(self._convolutions)  # frames on each side that a frame depends on: each kernel of 3 adds one

    def forward(self, maps: Tensor) -> Tensor:
        """Map (batch, 2, 161, frames), frames even, to (batch, channels, bins, frames / 2) float32."""
        sounding = maps.abs().amax(dim=(0, 1, 2)).nonzero()
        end = int(sounding[-1]) + 1 if len(sounding) else 0
        silent = -(-(end + self._reach) // 2)  # first output frame that depends on silence alone
        kept = 2 * (silent + self._reach // 2 + 1)  # nor does that frame depend on the padding at the end
        out: Tensor = self._convolutions(maps[..., :kept]).float()
        missing = (maps.shape[-1] - kept) // 2
        if missing <= 0:
            return out
        frame = out[..., silent : silent + 1]
        return torch.cat([out[..., :silent], frame.expand(*frame.shape[:-1], missing), out[..., silent:]], dim=-1)


class _FusedConvolution(nn.Module):
    """A convolution and its LeakyReLU in one call, which saves a pass over the maps (a sixth of the time in bfloat16).

    torch offers the call to its compiler only, hence the private name.
    """

    def __init__(self, convolution: nn.Module, activation: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        assert isinstance(convolution, nn.Conv2d) and isinstance(activation, nn.LeakyReLU)
        assert convolution.bias is not None
        self._weight, self._bias = (
            nn.Parameter(tensor.detach().to(dtype), requires_grad=False)
            for tensor in (convolution.weight, convolution.bias)
        )
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
