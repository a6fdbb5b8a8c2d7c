# training/: one loop for every recipe, its batches, Ray Train around it, runs side by side.
"""The samples of global batch t, and the reading of them.

`refs(t)` is a pure function of (mix, t): a batch has as many lanes as samples, and each lane is an endless stream, so
a resumed run needs t alone. A lane of labelled shards walks over its own row groups. A lane of listeners' scores draws
clips at random. `lanes.py` assigns lanes to workers.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from speechdistill.data.scored_clips import Labeled
from speechdistill.engine import held_out
from speechdistill.engine.finished_run import LabelRun
from speechdistill.engine.held_out import HeldOut
from speechdistill.io import audio
from speechdistill.io.errors import UserError
from speechdistill.training.lanes import Batch, Part, read_ahead, rng, scored, share

_WINDOW = 8  # row groups that a lane shuffles together, and that a reader keeps for it
_PATTERN = 1_000  # period in steps of the mixture of several runs, whose weights are so exact to a thousandth


@dataclass(frozen=True, kw_only=True)
class Mix:
    """The composition of a batch.

    `shards` are folders of label runs, each with an optional weight (`DIR=0.3`, default 1). `labeled_percent` of the
    lanes, rounded, are clips of `Labeled`. Raises `UserError` for settings that contradict each other.
    """

    shards: tuple[str, ...] = ()
    labeled_percent: float = 20.0
    batch_size: int = 20
    crop_s: float = audio.SEGMENT_S
    seed: int = 0
    hold_out: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1 or not 0 <= self.labeled_percent <= 100 or self.crop_s <= 0:
            fix = "use a batch size of at least 1, 0 to 100% labeled, and a crop length above 0 s"
            raise UserError(f"Invalid mix: {self}", fix)
        if self.seed < 0:
            raise UserError(f"Invalid seed {self.seed}", "use a seed of at least 0")
        if not self.shards and self.labeled_lanes < self.batch_size:
            raise UserError("no label shards", "give some, or 100% labeled clips")

    @property
    def labeled_lanes(self) -> int:
        return round(self.batch_size * self.labeled_percent / 100)

    @property
    def crop_samples(self) -> int:
        return round(self.crop_s * audio.SAMPLE_RATE)


class Ref(NamedTuple):
    """One sample of a batch: row `row` of row group `group` of label run `run`, or (run -1) labeled clip `row`.

    `crop` in [0, 1) is the start of the crop, between the first and the last possible one.
    """

    run: int
    group: int
    row: int
    crop: float


class Walk:
    """An endless walk over row groups of these sizes: `walk[n]` is (group, row), every row once per epoch.

    `rows(group)` are the rows of a group to visit, `sizes[group]` of them. Default: all rows.

    Each epoch has a new order of the groups. The rows of `_WINDOW` successive groups are shuffled together, so that a
    reader needs few groups at a time. Positions come from prefix sums: there is no state to resume.
    """

    def __init__(
        self,
        groups: np.ndarray,
        sizes: np.ndarray,
        key: tuple[int, ...],
        rows: Callable[[int], Iterable[int]] | None = None,
    ) -> None:
        self._groups, self._sizes, self._key = groups, sizes, key
        self._rows_of = rows
        self._length = int(sizes.sum())
        self._order = lru_cache(maxsize=2)(self._new_order)
        self._rows = lru_cache(maxsize=2)(self._new_rows)

    def __getitem__(self, n: int) -> tuple[int, int]:
        epoch, place = divmod(n, self._length)
        _, starts = self._order(epoch)
        window = bisect_right(starts, place) - 1
        group, row = self._rows(epoch, window)[place - starts[window]]
        return int(group), int(row)

    def _new_order(self, epoch: int) -> tuple[np.ndarray, list[int]]:
        """The order of the groups, and the position of the first row of each window."""
        order = rng(*self._key, epoch).permutation(len(self._groups))
        ends = np.cumsum(self._sizes[order])
        return order, [0, *ends[_WINDOW - 1 :: _WINDOW].tolist()]

    def _new_rows(self, epoch: int, window: int) -> np.ndarray:
        order, _ = self._order(epoch)
        chosen = order[window * _WINDOW : (window + 1) * _WINDOW]
        of = self._rows_of
        pairs = [
            (self._groups[i], row) for i in chosen for row in (of(self._groups[i]) if of else range(self._sizes[i]))
        ]
        return rng(*self._key, epoch, window).permutation(np.array(pairs))


class Batches:
    """Batches of a mix; raises `UserError` for unusable sources.

    `held` lists the samples held out of each run of the mix. Default: they are determined here.
    """

    def __init__(self, mix: Mix, labeled: Labeled | None = None, held: Sequence[HeldOut] | None = None) -> None:
        if mix.labeled_lanes and labeled is None:
            raise UserError(f"{mix.labeled_percent:g}% of each batch are labeled clips", "give --labeled, or 0 percent")
        self.mix, self._labeled = mix, labeled
        needed = mix.shards if mix.labeled_lanes < mix.batch_size or mix.hold_out else ()
        self.runs = [LabelRun(place) for place in needed]
        self.held = tuple(held or held_out.held_out(self.runs)) if self.runs else ()
        lanes = mix.batch_size - mix.labeled_lanes
        self._walks = [_walks(run, held, (mix.seed, 0, i), lanes) for i, (run, held) in enumerate(self._pairs())]
        self._pattern, self._before = _pattern([run.weight for run in self.runs], mix.seed)
        self._group = lru_cache(maxsize=_WINDOW * (lanes + 1))(self._read_group)
        self._validation = lru_cache(maxsize=1)(self._read_validation)

    def refs(self, t: int) -> list[Ref]:
        """Return the samples of global batch t: listeners' clips first."""
        return [self._ref(t, lane) for lane in range(self.mix.batch_size)]

    @property
    def batch_size(self) -> int:
        return self.mix.batch_size

    @property
    def datasets(self) -> list[str]:
        """The names behind the numbers of datasets."""
        return self._labeled.datasets.names if self._labeled else []

    def stream(self, start: int, stop: int, rank: int, world: int) -> Iterator[Batch]:
        """Yield a worker's share of batches `start` to `stop - 1`, read ahead on other threads."""
        lanes = share(self.batch_size, rank, world)
        return read_ahead(lambda t: Batch(t, (self.read([self._ref(t, lane) for lane in lanes]),)), range(start, stop))

    def read(self, refs: Sequence[Ref]) -> Part:
        """The samples `refs` of a batch."""
        read = [self._read(ref) for ref in refs]
        waves = [audio.fit(wave, self.mix.crop_samples) for wave, _, _ in read]
        targets = np.array([target for _, target, _ in read])
        of = [-1 if ref.run >= 0 or self._labeled is None else int(self._labeled.datasets.of[ref.row]) for ref in refs]
        return scored(np.stack(waves), targets, np.array(of), [name for _, _, name in read], self.batch_size)

    @property
    def num_held_out(self) -> int:
        """Return the number of labelled validation samples."""
        return sum(len(held.validation) for held in self.held)

    def held_out(self, rank: int, world: int) -> Iterator[tuple[np.ndarray, float]]:
        """Yield a worker's share of the labelled validation samples: whole waves and scores."""
        for data, audio_format, score in self._validation(rank, world):
            yield audio.decode(data, audio_format), score

    def _read_validation(self, rank: int, world: int) -> list[tuple[bytes, str, float]]:
        """Read the validation samples and keep them in memory, since each may cost the reading of a row group."""
        return [
            (row["audio"], row["audio_format"], row["score"])
            for run, held in self._pairs()
            for _, row in run.read(np.array_split(held.validation, world)[rank])
        ]

    def _read_group(self, run: int, group: int) -> pa.Table:
        """Return a row group as it lies in the file, with the audio still coded."""
        return self.runs[run].read_group(group)

    def _pairs(self) -> Iterator[tuple[LabelRun, HeldOut]]:
        return zip(self.runs, self.held, strict=True)

    def _ref(self, t: int, lane: int) -> Ref:
        crop = float(rng(self.mix.seed, 1, t, lane).random())
        if lane < self.mix.labeled_lanes:
            assert self._labeled is not None
            return Ref(-1, 0, self._labeled.datasets.draw(rng(self.mix.seed, 2, t, lane)), crop)
        period, place = divmod(t, len(self._pattern))
        run = int(self._pattern[place])
        of_run = period * int(self._before[-1, run]) + int(self._before[place, run])
        walks, pseudo_lane = self._walks[run], lane - self.mix.labeled_lanes
        lanes = self.mix.batch_size - self.mix.labeled_lanes
        group, row = walks[pseudo_lane][of_run] if len(walks) > 1 else walks[0][of_run * lanes + pseudo_lane]
        return Ref(run, group, row, crop)

    def _read(self, ref: Ref) -> tuple[np.ndarray, float, str]:
        if ref.run < 0:
            assert self._labeled is not None
            return self._labeled.read(ref.row, ref.crop, self.mix.crop_samples)
        run = self.runs[ref.run]
        row = self._group(ref.run, ref.group).slice(ref.row, 1).to_pylist()[0]
        start = int(ref.crop * (max(0, row["num_samples"] - self.mix.crop_samples) + 1))
        wave = audio.decode(row["audio"], row["audio_format"], start, self.mix.crop_samples)
        return wave, row["score"], f"{run.out}#{row['sample_id']}"


def _walks(run: LabelRun, held: HeldOut, key: tuple[int, ...], lanes: int) -> list[Walk]:
    """One walk per lane over its own groups. If those were fewer than a window, all lanes share one walk."""
    trains = np.ones(int(run.groups.sizes.sum()), bool)
    trains[held.left_out] = False
    sizes = np.add.reduceat(trains, run.groups.starts, dtype=np.int64)
    groups = np.flatnonzero(sizes)
    if not len(groups):
        raise UserError(f"{run.out}: all of its clips are held out", "leave it out of --shards")

    def rows(group: int) -> np.ndarray:
        return np.flatnonzero(trains[run.groups.starts[group] : run.groups.starts[group] + run.groups.sizes[group]])

    dealt = rng(*key).permutation(groups)
    own = [dealt[lane::lanes] for lane in range(lanes)] if len(groups) >= lanes * _WINDOW else [dealt]
    return [Walk(mine, sizes[mine], (*key, lane), rows) for lane, mine in enumerate(own)]


def _pattern(weights: Sequence[float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For each step of a period the run to read from, and the number of earlier reads from each run."""
    if len(weights) < 2:
        pattern = np.zeros(1, np.int64)
    else:
        exact = np.array(weights) / np.sum(weights) * _PATTERN
        ends = np.round(np.cumsum(exact)).astype(np.int64)
        pattern = rng(seed, 3).permutation(np.searchsorted(ends, np.arange(_PATTERN), side="right"))
    counts = np.cumsum(pattern[:, None] == np.arange(max(1, len(weights))), axis=0)
    return pattern, np.vstack([np.zeros_like(counts[:1]), counts])
