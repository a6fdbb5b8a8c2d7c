"""Scoring a recording by its windows, for every teacher whose network takes a limited length."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.metrics.logistic import sigmoid
from speechdistill.models import parameters
from speechdistill.models.label import Label, Unscorable, problem
from speechdistill.models.networks.conv_transformer import SEGMENT_SAMPLES
from speechdistill.models.options import HOP_S
from speechdistill.models.parameters import Parameters

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LOG = logging.getLogger(__name__)


class Windows(Protocol):
    """The windows in which a recording is scored; all numbers are samples."""

    @property
    def length(self) -> int: ...

    def starts(self, wave: np.ndarray) -> list[int]:
        """Return the first sample of each window, of at least one."""
        ...

    def cut(self, wave: np.ndarray, start: int) -> np.ndarray:
        """Return the window that begins at `start`, which may be shorter or longer than `length`."""
        ...


class Forward(Protocol):
    """A network as a function of windows; `network` is None if it is not a torch module."""

    @property
    def network(self) -> nn.Module | None: ...

    def __call__(self, windows: Sequence[np.ndarray]) -> Tensor:
        """Return the windows' logits, (windows,) float64; a GPU may still be computing them."""
        ...


@dataclass(frozen=True, kw_only=True)
class EvenWindows:
    """Windows of `length` samples, at most `hop` apart, placed as by the released model.

    A recording of up to `whole` samples is one window; one below `shortest` is repeated to that length. `sounding`
    leaves silent windows of a longer recording out.
    """

    hop: int
    length: int = SEGMENT_SAMPLES
    whole: int = 0
    shortest: int = 0
    sounding: bool = False

    def starts(self, wave: np.ndarray) -> list[int]:
        if len(wave) <= self.whole:
            return [0]
        starts = segment_starts(len(wave), self.hop, self.length)
        return [start for start in starts if problem(self.cut(wave, start)) is None] if self.sounding else starts

    def cut(self, wave: np.ndarray, start: int) -> np.ndarray:
        if len(wave) < self.shortest:
            return wave.take(range(self.shortest), mode="wrap")
        return wave if len(wave) <= self.whole else wave[start : start + self.length]


class WindowScorer:
    """A `Teacher` that scores each recording by the mean score of its windows.

    `batch` windows go through `forward` at once. The batch becomes smaller for good if a GPU runs out of memory.
    """

    intrusive = False

    def __init__(self, name: str, weights_hash: str, windows: Windows, batch: int, forward: Forward) -> None:
        self.name, self.weights_hash = name, weights_hash
        self.windows, self.batch, self.forward = windows, batch, forward

    def label(
        self, waves: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None
    ) -> list[Label | Unscorable]:
        """Return one result per wave; waves are mono float32 at 16 kHz of any lengths, memory maps too."""
        problems = [problem(wave) for wave in waves]
        good = [wave for wave, why in zip(waves, problems, strict=True) if why is None]
        labels = (Label.from_logits(logits) for logits in self._logits(good))
        return [why or next(labels) for why in problems]

    def timeline(self, wave: np.ndarray) -> list[tuple[float, float | None]]:
        """Return (start in s, score) for each second: the score of the window centred nearest its middle.

        Windows are those that `label` averages. The score is None if the window is silent. Raises `Unscorable` for a
        wave that cannot be scored.
        """
        if why := problem(wave):
            raise why
        starts = self.windows.starts(wave)
        (logits,) = self._logits([wave])
        scores = [
            None if problem(self.windows.cut(wave, start)) else float(1 + 4 * quality)
            for start, quality in zip(starts, sigmoid(logits), strict=True)
        ]
        centres = np.array(starts) + self.windows.length / 2
        begins = range(0, len(wave), SAMPLE_RATE)
        middles = [(begin + min(begin + SAMPLE_RATE, len(wave))) / 2 for begin in begins]
        nearest = [int(np.abs(centres - middle).argmin()) for middle in middles]
        return [(begin / SAMPLE_RATE, scores[i]) for begin, i in zip(begins, nearest, strict=True)]

    def parameters(self) -> Parameters | None:
        """Count the network's parameters; None if it is not a torch module."""
        network = self.forward.network
        return None if network is None else parameters.count(network)

    def _logits(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Return the logits of each wave's windows; batches cross waves, in order of length."""
        order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
        starts = [self.windows.starts(waves[i]) for i in order]
        windows = (self.windows.cut(waves[i], start) for i, its in zip(order, starts, strict=True) for start in its)
        logits = [batch.numpy() for batch in _one_behind(self._batches(windows))]
        if not logits:
            return []
        ends = np.cumsum([len(its) for its in starts])
        of_wave = dict(zip(order, np.split(np.concatenate(logits), ends[:-1]), strict=True))
        return [of_wave[i] for i in range(len(waves))]

    def _batches(self, windows: Iterator[np.ndarray]) -> Iterator[Tensor]:
        while batch := list(islice(windows, self.batch)):
            yield from self._in_memory(batch)

    def _in_memory(self, batch: list[np.ndarray]) -> Iterator[Tensor]:
        """Return the logits of a batch; halve it and all later ones if it does not fit a GPU's memory."""
        try:
            yield self.forward(batch)
            return
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()  # here, after the traceback has released the tensors
        self.batch = (len(batch) + 1) // 2
        _LOG.warning("%s: a batch of %d does not fit the GPU's memory; now %d", self.name, len(batch), self.batch)
        yield from self._batches(iter(batch))


def segment_starts(
    num_samples: int, hop: int = round(HOP_S * SAMPLE_RATE), segment_samples: int = SEGMENT_SAMPLES
) -> list[int]:
    """Return the first samples of a wave's windows, placed as by the released model: evenly, at most `hop` apart.

    A wave of up to one window has one, which is zero-padded at the end.
    """
    over = max(0, num_samples - segment_samples)
    return [int(place * over) for place in np.linspace(0, 1, math.ceil(over / hop) + 1)]


def _one_behind(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Yield each batch on the CPU after the next one has started, so that a GPU computes while windows are cut."""
    waiting: Tensor | None = None
    for batch in batches:
        if waiting is not None:
            yield waiting.cpu()
        waiting = batch
    if waiting is not None:
        yield waiting.cpu()
