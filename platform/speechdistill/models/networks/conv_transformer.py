"""The convolutional transformer of Distill-MOS: one class, and every variant is a `ConvTransformerConfig`.

Layout and state-dict keys are those of the released v7 weights (`distillmos` 0.9.1, MIT), so that file loads
with `strict=True`. It also settles the details that the paper leaves open (section III-B).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from speechdistill.io.audio import SAMPLE_RATE, SEGMENT_S
from speechdistill.io.errors import UserError

SEGMENT_SAMPLES = round(SEGMENT_S * SAMPLE_RATE)
"""Longest input, 122,880 samples: 768 STFT frames."""

FRAME_SAMPLES = 320
"""Samples for each frame after the strided last convolution; the length of an input is a multiple."""

FRAMES = SEGMENT_SAMPLES // FRAME_SAMPLES
"""Most frames that a quality head takes: 384."""

_LENGTHS = range(FRAME_SAMPLES, SEGMENT_SAMPLES + 1, FRAME_SAMPLES)

_WINDOW, _HOP = 320, 160  # 20 ms and 10 ms at 16 kHz
_BINS = _WINDOW // 2 + 1
_KERNEL = 3
_FIRST_FLOAT32 = 2  # convolutions before the autocast part; each is a Conv2d and an activation


@dataclass(frozen=True)
class ConvTransformerConfig:
    """The size of a student; the defaults are v7, 4,133,226 trainable parameters.

    `stride_convs` counts the layers of stride (2, 1) between the (1, 1) first and the (2, 2) last one.
    `segment_samples` is the length of training crops and of windows in scoring: the student scores other lengths worse.
    Raises `ValueError` for sizes that do not fit together, `UserError` for a length that does not fit.
    """

    max_channels: int = 256
    stride_convs: int = 4
    dim: int = 200
    heads: int = 8
    layers: int = 7
    segment_samples: int = SEGMENT_SAMPLES

    def __post_init__(self) -> None:
        if min(self.max_channels, self.stride_convs, self.dim, self.heads, self.layers) < 1:
            raise ValueError(f"{self}: every size must be at least 1")
        if self.dim % 2 or self.dim % self.heads:  # sine and cosine pairs; equal heads
            raise ValueError(f"{self}: dim must be even and a multiple of heads")
        if self.segment_samples not in _LENGTHS:
            raise UserError(
                f"segments of {self.segment_samples / SAMPLE_RATE:g} s do not fit the student",
                f"give a multiple of {FRAME_SAMPLES / SAMPLE_RATE:g} s, at most {SEGMENT_S:g}",
            )
        if self.bins_out < 1:
            raise ValueError(f"{self}: at most 5 stride_convs leave a frequency bin")

    @property
    def channels(self) -> list[int]:
        """Output channels of each convolution."""
        return [min(64 * 2 ** max(i - 1, 0), self.max_channels) for i in range(self.stride_convs + 2)]

    @property
    def strides(self) -> list[tuple[int, int]]:
        """(frequency, time) stride of each convolution."""
        return [(1, 1), *[(2, 1)] * self.stride_convs, (2, 2)]

    @property
    def bins_out(self) -> int:
        """Frequency bins left of 161 by the convolutions, which are not padded along frequency."""
        bins = _BINS
        for stride, _ in self.strides:
            bins = (bins - _KERNEL) // stride + 1
        return bins


def v0() -> ConvTransformerConfig:
    """176,146 parameters. The paper names ten students and publishes one, v7; the others here follow its rules."""
    return replace(v7(), max_channels=64, stride_convs=3, dim=24, heads=4, layers=2)


def v1() -> ConvTransformerConfig:
    """278,914 parameters."""
    return replace(v7(), max_channels=64, dim=64, heads=4, layers=2)


def v2() -> ConvTransformerConfig:
    """429,122 parameters."""
    return replace(v7(), max_channels=64, dim=80, heads=4, layers=4)


def v3() -> ConvTransformerConfig:
    """767,442 parameters."""
    return replace(v7(), max_channels=128, dim=80, heads=4, layers=3)


def v4() -> ConvTransformerConfig:
    """1,114,082 parameters."""
    return replace(v7(), max_channels=128, dim=120, heads=4, layers=4)


def v5() -> ConvTransformerConfig:
    """1,724,002 parameters."""
    return replace(v7(), max_channels=128, dim=160, layers=5)


def v6() -> ConvTransformerConfig:
    """2,551,170 parameters."""
    return replace(v7(), dim=128, layers=6)


def v7() -> ConvTransformerConfig:
    """4,133,226 parameters: the published student, and the released weights."""
    return ConvTransformerConfig()


def v8() -> ConvTransformerConfig:
    """13,045,250 parameters."""
    return replace(v7(), max_channels=512, dim=320, layers=10)


def v9() -> ConvTransformerConfig:
    """45,711,298 parameters."""
    return replace(v7(), max_channels=512, dim=576, layers=15)


VARIANTS = {variant.__name__: variant for variant in (v0, v1, v2, v3, v4, v5, v6, v7, v8, v9)}


class ConvTransformer(nn.Module):
    """A student: waveform segments to quality logits, of which `to_mos` is the score.

    Under `torch.autocast` only the convolutions from the third to the last but one run in the lower precision (70% of
    v7's operations). In bfloat16 that moves v7's scores of real speech by at most 0.0032 MOS (over 500 clips, clean,
    noisy and band-limited); autocast of the whole network moves them by up to 0.017.
    """

    def __init__(self, config: ConvTransformerConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or ConvTransformerConfig()
        # Channels last: an update of v0 on a CPU is 1.6 to 2.2 times as fast, in float32 and bfloat16.
        self.cnn = _Convolutions(config).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        dim_maps = config.channels[-1] * config.bins_out
        self.transformer_pool_attn = QualityHead(dim_maps, config.dim, config.heads, config.layers)

    def forward(self, segments: Tensor) -> Tensor:
        """Map segments (batch, num_samples) at 16 kHz, any level, to logits (batch,).

        Logits are float32, float64 if the parameters are. Segments have 122,880 samples, fewer in training on crops.
        Raises `ValueError` for another shape: pad or crop with `speechdistill.io.audio.fit`.
        """
        if segments.ndim != 2 or segments.shape[1] not in _LENGTHS:
            raise ValueError(
                f"shape {tuple(segments.shape)}; expected segments (batch, {SEGMENT_SAMPLES}), or shorter ones of a "
                f"multiple of {FRAME_SAMPLES} samples"
            )
        maps = self.cnn(features(segments))  # (batch, channels, bins, frames)
        with _float32(maps):
            logits: Tensor = self.transformer_pool_attn(maps.flatten(1, 2).transpose(1, 2))
        return logits


def to_mos(logits: Tensor) -> Tensor:
    """Map quality logits to scores from 1 to 5."""
    return 1 + 4 * torch.sigmoid(logits)


def features(segments: Tensor) -> Tensor:
    """Compute the compressed complex spectrum of peak-normalised waves, as the released model does.

    (batch, num_samples) to (batch, 2, 161, num_samples // 160): real and imaginary part of the STFT with the magnitude
    to the power 0.3. At least float32: bfloat16 has 3 digits, and the spectrum spans 10.
    """
    with _float32(segments):
        waves = _at_least_float32(segments)
        waves = waves / (waves.abs().amax(dim=1, keepdim=True) + 1e-8)
        margin = (_WINDOW - _HOP) // 2
        spectrum = torch.stft(
            F.pad(waves, (margin, margin), mode="reflect"),
            n_fft=_WINDOW,
            hop_length=_HOP,
            window=torch.hann_window(_WINDOW, dtype=waves.dtype, device=waves.device),
            center=False,
            return_complex=True,
        )
        parts = torch.view_as_real(spectrum).movedim(-1, 1)
        # The floor of 1e-12 is applied under the root, so that silence has the gradient 0, not NaN.
        magnitude = parts.square().sum(dim=1, keepdim=True).clamp(min=1e-24).sqrt()
        return parts * magnitude.pow(0.3 - 1)


class _Convolutions(nn.Module):
    def __init__(self, config: ConvTransformerConfig) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        inputs = 2
        for channels, stride in zip(config.channels, config.strides, strict=True):
            stages += [nn.Conv2d(inputs, channels, _KERNEL, stride, padding=(0, 1)), nn.LeakyReLU(0.1)]
            inputs = channels
        self.cnn = nn.Sequential(*stages)

    def forward(self, maps: Tensor) -> Tensor:
        with _float32(maps):
            maps = self.cnn[: 2 * _FIRST_FLOAT32](maps)
        maps = self.cnn[2 * _FIRST_FLOAT32 : -2](maps)  # the only part in autocast's precision
        with _float32(maps):
            out: Tensor = self.cnn[-2:](_at_least_float32(maps))
        return out


class QualityHead(nn.Module):
    """BatchNorm, transformer, attention pooling and a linear output, as in XLS-R teachers.

    `forward` takes (batch, frames <= 384, dim_input) and returns logits (batch,) float32.
    """

    def __init__(self, dim_input: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.norm_input = nn.BatchNorm1d(dim_input)
        self.transformer = _Transformer(dim_input, dim, heads, layers)
        self.norm_trans = nn.BatchNorm1d(dim)
        self.pool = _AttentionPool(dim)

    def forward(self, frames: Tensor) -> Tensor:
        hidden = self.transformer(_over_frames(self.norm_input, frames))
        logits: Tensor = self.pool(_over_frames(self.norm_trans, hidden))
        return logits


class _Transformer(nn.Module):
    def __init__(self, dim_input: int, dim: int, heads: int, layers: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim_input)  # a second one after `norm_input`, as in the released file
        self.position_encoding = _PositionEncoding(dim)
        self.linear_proj = nn.Linear(dim_input, dim)
        layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, batch_first=True)
        self.transformer_encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)

    def forward(self, frames: Tensor) -> Tensor:
        hidden = self.linear_proj(_over_frames(self.norm, frames))
        out: Tensor = self.transformer_encoder(self.position_encoding(hidden))
        return out


class _PositionEncoding(nn.Module):
    pe: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Wavelengths up to twice the sequence (768); "Attention Is All You Need" has 10000.
        rates = torch.exp(torch.arange(0, dim, 2) * (-math.log(2 * FRAMES) / dim))
        angles = torch.arange(FRAMES)[:, None] * rates
        self.register_buffer("pe", torch.stack([angles.sin(), angles.cos()], dim=-1).reshape(1, FRAMES, dim))

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.pe[:, : hidden.shape[1]]


class _AttentionPool(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(dim, 2 * dim)
        self.linear2 = nn.Linear(2 * dim, 1)
        self.linear3 = nn.Linear(dim, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        weights = self.linear2(F.relu(self.linear1(hidden))).softmax(dim=1)  # (batch, frames, 1)
        logits: Tensor = self.linear3((weights * hidden).sum(dim=1))
        return _at_least_float32(logits.squeeze(-1))


def _float32(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype is torch.float64 else tensor.float()


def _over_frames(norm: nn.Module, frames: Tensor) -> Tensor:
    """Normalise the last dimension of (batch, frames, dim); BatchNorm1d alone normalises dimension 1."""
    out: Tensor = norm(frames.transpose(1, 2)).transpose(1, 2)
    return out
