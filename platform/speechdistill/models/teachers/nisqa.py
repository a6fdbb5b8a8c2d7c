"""NISQA v2.0 (Mittag et al. 2021): the overall quality of transmitted speech, from mel spectrograms, 0.25 M parameters.

The network is built here: torchmetrics has it as private functions that need librosa, and downloads the weights itself.
The weights are for non-commercial use (CC BY-NC-SA 4.0).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_max_pool2d, relu

from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.models import released
from speechdistill.models.options import TeacherOptions
from speechdistill.models.released import Release
from speechdistill.models.windowed import EvenWindows, WindowScorer

_SHORTEST_SAMPLES = 2240  # 0.14 s, one segment of 15 frames
_WHOLE_S = 52  # NISQA's own limit: 1300 segments 40 ms apart
_DIMENSIONS = 5  # overall MOS, noisiness, discontinuity, coloration, loudness
_MOS = 0
_QUIETEST, _DYNAMICS_DB = 1e-4, 80.0  # amplitude_to_db of librosa, as NISQA calls it
_DEFAULTS = TeacherOptions()


def _place() -> str:
    return str(Path.home() / ".torchmetrics" / "NISQA" / "nisqa.tar")


_RELEASE = Release(
    teacher="nisqa",
    model="NISQA",
    url="https://github.com/gabrielmittag/NISQA/raw/master/weights/nisqa.tar",
    terms="1 MB, CC BY-NC-SA 4.0: not for commercial use",
    place=_place,
)


def load(options: TeacherOptions = _DEFAULTS) -> WindowScorer:
    """Load the overall MOS, without the network's four dimensions; errors are those of `released.scorer`.

    Waves stay at 16 kHz, as files of 16 kHz do in NISQA: the mel bands above 8 kHz are then empty. Waves of up to 52 s
    are scored whole, longer ones in windows of 7.68 s; waves below 0.14 s are repeated. `weights` is a file like
    `nisqa.tar`, whose `args` decide the features.
    """
    windows = EvenWindows(hop=options.hop(), whole=_WHOLE_S * SAMPLE_RATE, shortest=_SHORTEST_SAMPLES)
    return released.scorer(_RELEASE, options, windows, _network, _overall)


def _network(saved: Any) -> nn.Module:
    network = Network(saved["args"])
    network.load_state_dict({name.replace(".model.", "."): value for name, value in saved["model_state_dict"].items()})
    return network


def _overall(scores: Tensor) -> Tensor:
    return scores[:, _MOS]


class Network(nn.Module):
    """Waves (batch, num_samples) at 16 kHz to scores (batch, 5), from 1 to 5 or a little beyond.

    `args` are the settings in a NISQA file. Raises `KeyError` if one is missing, and `RuntimeError` for weights of
    another sample rate.
    """

    def __init__(self, args: Mapping[str, Any]) -> None:
        super().__init__()
        if args["ms_sr"] not in (None, SAMPLE_RATE):
            raise RuntimeError(
                f"weights for audio of {args['ms_sr']} Hz; give weights that were trained on any rate, or on 16000 Hz"
            )
        width, hidden = args["td_sa_d_model"], args["pool_att_h"]
        self._segments = int(args["ms_seg_length"]), int(args["ms_seg_hop_length"])
        self.mels = _Mels(args)
        self.cnn = _Convolutions(args)
        layers = [
            nn.TransformerEncoderLayer(width, args["td_sa_nhead"], args["td_sa_h"], batch_first=True)
            for _ in range(args["td_sa_num_layers"])
        ]
        self.time_dependency = nn.ModuleDict(
            {
                "linear": nn.Linear(self.cnn.features, width),
                "norm1": nn.LayerNorm(width),
                "layers": nn.Sequential(*layers),
            }
        )
        self.pool_layers = nn.ModuleList(_Pool(width, hidden) for _ in range(_DIMENSIONS))

    def forward(self, waves: Tensor) -> Tensor:
        segments = self.mels(waves).unfold(2, *self._segments).transpose(1, 2)  # (batch, segments, mels, frames)
        frames = self.cnn(segments.flatten(0, 1)[:, None]).unflatten(0, segments.shape[:2])
        for part in ("linear", "norm1", "layers"):
            frames = self.time_dependency[part](frames)
        return torch.cat([pool(frames) for pool in self.pool_layers], 1)


class _Mels(nn.Module):
    """Waves (batch, num_samples) to mels (batch, mels, frames) in dB, at most 80 below each wave's loudest."""

    filters: Tensor
    window: Tensor

    def __init__(self, args: Mapping[str, Any]) -> None:
        from transformers.audio_utils import mel_filter_bank

        super().__init__()
        self._size, self._hop = int(args["ms_n_fft"]), int(SAMPLE_RATE * args["ms_hop_length"])
        with warnings.catch_warnings(action="ignore"):  # empty bands are intended
            filters = mel_filter_bank(
                self._size // 2 + 1,
                args["ms_n_mels"],
                0.0,
                args["ms_fmax"],
                SAMPLE_RATE,
                norm="slaney",
                mel_scale="slaney",
            )
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)
        window = torch.hann_window(int(SAMPLE_RATE * args["ms_win_length"]))
        self.register_buffer("window", window, persistent=False)

    def forward(self, waves: Tensor) -> Tensor:
        spectra = torch.stft(
            waves, self._size, self._hop, len(self.window), self.window, pad_mode="reflect", return_complex=True
        )
        mels = (spectra.abs().transpose(1, 2) @ self.filters).transpose(1, 2)
        decibels = 20 * mels.clamp(min=_QUIETEST).log10()
        return decibels.maximum(decibels.amax((1, 2), keepdim=True) - _DYNAMICS_DB)


class _Convolutions(nn.Module):
    """Segments (batch, 1, mels, frames) to features (batch, features)."""

    def __init__(self, args: Mapping[str, Any]) -> None:
        super().__init__()
        first, second, third = args["cnn_c_out_1"], args["cnn_c_out_2"], args["cnn_c_out_3"]
        self._pools = {1: args["cnn_pool_1"], 2: args["cnn_pool_2"], 4: args["cnn_pool_3"]}
        height, width = args["cnn_pool_3"]
        self.features = third * height
        channels = (1, first, second, third, third, third, third)
        for i in range(1, len(channels)):
            last = i == len(channels) - 1  # as wide as its input
            shape, padding = ((3, width), (1, 0)) if last else ((3, 3), (1, 1))
            self.add_module(f"conv{i}", nn.Conv2d(channels[i - 1], channels[i], shape, padding=padding))
            self.add_module(f"bn{i}", nn.BatchNorm2d(channels[i]))

    def forward(self, maps: Tensor) -> Tensor:
        for i in range(1, 7):
            maps = relu(self.get_submodule(f"bn{i}")(self.get_submodule(f"conv{i}")(maps)))
            if i in self._pools:
                maps = adaptive_max_pool2d(maps, self._pools[i])
        return maps.flatten(1)


class _Pool(nn.Module):
    """Frames (batch, frames, width) to scores (batch, 1) of their mean over time, weighted by attention."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, 1)
        self.linear3 = nn.Linear(width, 1)

    def forward(self, frames: Tensor) -> Tensor:
        weights = self.linear2(relu(self.linear1(frames))).softmax(1)
        score: Tensor = self.linear3((weights * frames).sum(1))
        return score
