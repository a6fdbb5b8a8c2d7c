"""Scoring a recording by its windows, for every teacher that scores a limited length at once."""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.io.errors import UserError
from speechdistill.models.label import Label, Unscorable, problem, sigmoid
from speechdistill.models.networks.conv_transformer import SEGMENT_SAMPLES

HOP_S = 1.0
"""Windows of long audio start at most so far apart in the released model."""

_LOG = logging.getLogger(__name__)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_LONGEST_S = SEGMENT_SAMPLES / SAMPLE_RATE


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

    def _forward(self, windows: Sequence[np.ndarray]) -> Tensor:
        """The logits of up to `_batch` windows, (windows,) float64; a GPU may still be computing them.

        A window may be shorter than `_segment`.
        """
        raise NotImplementedError

    def _logits(self, waves: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Per wave the logits of its windows; the batches run across waves, those of like length together."""
        order = sorted(range(len(waves)), key=lambda i: len(waves[i]))
        starts = [self._starts(waves[i]) for i in order]
        windows = (self._window(waves[i], start) for i, its in zip(order, starts, strict=True) for start in its)
        logits = [batch.numpy() for batch in _one_behind(self._batches(windows))]
        if not logits:
            return []
        ends = np.cumsum([len(its) for its in starts])
        of_wave = dict(zip(order, np.split(np.concatenate(logits), ends[:-1]), strict=True))
        return [of_wave[i] for i in range(len(waves))]

    def _batches(self, windows: Iterator[np.ndarray]) -> Iterator[Tensor]:
        while batch := list(islice(windows, self._batch)):
            yield from self._in_memory(batch)

    def _in_memory(self, batch: list[np.ndarray]) -> Iterator[Tensor]:
        """The logits of a batch; if a GPU's memory is too small for it, it and all to come are halved."""
        try:
            yield self._forward(batch)
            return
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
        torch.cuda.empty_cache()  # here, where the traceback no longer holds the tensors
        self._batch = (len(batch) + 1) // 2
        _LOG.warning("%s: a batch of %d does not fit the GPU's memory; now %d", self.name, len(batch), self._batch)
        yield from self._batches(iter(batch))


def segment_starts(
    num_samples: int, hop: int = round(HOP_S * SAMPLE_RATE), segment_samples: int = SEGMENT_SAMPLES
) -> list[int]:
    """First samples of the windows over a wave, as the released model places them: evenly, at most `hop` apart.

    A wave of up to one window has one, which is zero-padded at the end.
    """
    over = max(0, num_samples - segment_samples)
    return [int(place * over) for place in np.linspace(0, 1, math.ceil(over / hop) + 1)]


def check(dtype: str, batch_s: float | None, hop_s: float, longest_s: float = _LONGEST_S) -> None:
    """Raise `UserError` for a dtype, batch or hop that a teacher with windows of `longest_s` cannot take."""
    if dtype not in DTYPES:
        raise UserError(f"dtype {dtype!r}", f"choose from {list(DTYPES)}")
    if batch_s is not None and not batch_s > 0:
        raise UserError(f"batch_s {batch_s}", "give seconds of audio, above 0")
    if not 0 < hop_s <= longest_s:
        raise UserError(f"hop_s {hop_s}", f"choose seconds above 0 and up to {longest_s} (released: {HOP_S})")


def _one_behind(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """Each batch on the CPU, once the next one is on its way: its windows are put together while a GPU computes."""
    waiting: Tensor | None = None
    for batch in batches:
        if waiting is not None:
            yield waiting.cpu()
        waiting = batch
    if waiting is not None:
        yield waiting.cpu()
