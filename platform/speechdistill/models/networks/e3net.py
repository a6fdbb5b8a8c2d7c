"""E3Net, the end-to-end enhancement network for personalised speech enhancement (Eskimez et al. 2022, section 3.1).

A learned encoder, a mask from LSTM blocks that see the embedding of the wanted speaker, and a learned decoder. Causal
but for the window of 20 ms.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

HOP_SAMPLES = 160
"""10 ms at 16 kHz; the window has two hops."""

WINDOW_SAMPLES = 2 * HOP_SAMPLES


@dataclass(frozen=True, kw_only=True)
class E3NetConfig:
    """Sizes of an E3Net; the defaults are the paper's baseline of 4 blocks with an embedding of 256.

    `speaker` is the size of the speaker's embedding, `features` that of other features for each frame (hidden states
    of a pre-trained encoder, say); 0 for none. The paper does not state the size of its embedding: 128 fits its counts
    best. Raises `ValueError` for sizes below 1.
    """

    blocks: int = 4
    filters: int = 2048
    dim: int = 256
    hidden: int = 1024
    speaker: int = 256
    features: int = 0

    def __post_init__(self) -> None:
        if min(self.blocks, self.filters, self.dim, self.hidden) < 1 or min(self.speaker, self.features) < 0:
            raise ValueError(f"{self}: every size must be at least 1, speaker and features at least 0")


def e3net(blocks: int, speaker: int = 256) -> E3NetConfig:
    """The paper's sizes: 4 blocks for the baseline, 8 for the teacher, 2 for the student."""
    return E3NetConfig(blocks=blocks, speaker=speaker)


def debug(blocks: int = 2) -> E3NetConfig:
    """The debug twin: 347,719 parameters with 2 blocks, every part of the large ones."""
    return replace(e3net(blocks), filters=256, dim=64, hidden=256)


VARIANTS = {f"e3net-n{blocks}": e3net(blocks) for blocks in (1, 2, 4, 8)} | {"e3net-debug": debug()}
"""The sizes that have a name."""


class E3Net(nn.Module):
    """Noisy speech (batch, num_samples) at 16 kHz to enhanced speech of the same shape.

    Embeddings are centred by `speaker_mean`, the mean over the training set, and scaled to components of about unit
    size: beside normalised features those of a unit vector are too small to learn from (measured).
    """

    speaker_mean: Tensor

    def __init__(self, config: E3NetConfig) -> None:
        super().__init__()
        self.config = config
        filters, dim = config.filters, config.dim
        self.encoder = nn.Conv1d(1, filters, WINDOW_SAMPLES, HOP_SAMPLES)
        self.activation, self.norm = nn.PReLU(), nn.LayerNorm(filters)
        inputs = filters + config.speaker + config.features
        self.projection = nn.Sequential(nn.Linear(inputs, dim), nn.PReLU(), nn.LayerNorm(dim))
        self.blocks = nn.ModuleList(Block(dim, config.hidden) for _ in range(config.blocks))
        self.mask = nn.Linear(dim, filters)
        self.decoder = nn.ConvTranspose1d(filters, 1, WINDOW_SAMPLES, HOP_SAMPLES)
        self.register_buffer("speaker_mean", torch.zeros(config.speaker))

    def forward(self, noisy: Tensor, speaker: Tensor | None = None, features: Tensor | None = None) -> Tensor:
        """`speaker` is (batch, speaker), `features` (batch, frames, features) with frames of `num_frames`."""
        num_samples = noisy.shape[-1]
        pad = num_frames(num_samples) * HOP_SAMPLES - num_samples
        waves = F.pad(noisy[:, None], (HOP_SAMPLES, pad))
        coded = self.encoder(waves).transpose(1, 2)  # (batch, frames, filters)
        conditions = self._conditions(coded.shape[1], speaker, features)
        states = self.projection(torch.cat([self.norm(self.activation(coded)), *conditions], dim=2))
        for block in self.blocks:
            states = block(states)
        masked = coded * torch.sigmoid(self.mask(states))
        enhanced: Tensor = self.decoder(masked.transpose(1, 2))[:, 0]
        return enhanced[:, HOP_SAMPLES : HOP_SAMPLES + num_samples]

    def _conditions(self, frames: int, speaker: Tensor | None, features: Tensor | None) -> list[Tensor]:
        """The conditions of each frame, (batch, frames, size) each."""
        _check("speaker", self.config.speaker, speaker)
        _check("features", self.config.features, features)
        conditions = []
        if speaker is not None:
            scaled = (speaker - self.speaker_mean) * self.config.speaker**0.5
            conditions.append(scaled[:, None].expand(-1, frames, -1))
        if features is not None:
            conditions.append(features)
        return conditions


def _check(name: str, size: int, given: Tensor | None) -> None:
    there = given.shape[-1] if given is not None else 0
    if there != size:
        raise ValueError(f"{name} of {there} values; the network takes {size}")


class Block(nn.Module):
    """An LSTM block, (batch, frames, dim) to the same shape: a fully connected part, then an LSTM around its output.

    The residual is the output of the fully connected part (figure 1), neither the block's input nor the LSTM's output.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.connected = nn.Sequential(
            nn.Linear(dim, hidden), nn.PReLU(), nn.Linear(hidden, dim), nn.PReLU(), nn.LayerNorm(dim)
        )
        self.lstm = nn.LSTM(dim, dim, batch_first=True)
        self.lstm_norm, self.norm = nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, states: Tensor) -> Tensor:
        connected = self.connected(states)
        recurrent: Tensor = self.norm(connected + self.lstm_norm(self.lstm(connected)[0]))
        return recurrent


def num_frames(num_samples: int) -> int:
    """Frames of a wave: one for each hop, rounded up, and one more, so that two windows cover every sample."""
    return -(-num_samples // HOP_SAMPLES) + 1
