"""Clips that listeners scored: which of them train, which validate, drawing and reading them."""

import hashlib
import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from speechdistill.data.clips import clip_id
from speechdistill.data.corpora import listing
from speechdistill.data.label_scale import LabelTransform
from speechdistill.io import audio, table
from speechdistill.io.errors import AudioError, TableError, UnreadableError

_LOG = logging.getLogger(__name__)
_SPLITS = ("train", "validation", "test")
_CAP = 7_000  # a dataset counts as at most so many clips (Distill-MOS caps above 7,000; the form is ours)
_VALIDATION_SHARE = 20  # one clip of so many, where the clips name no split
_TRIES = 20  # clips tried in place of one that cannot be used
_THREADS = 16


class Clip(NamedTuple):
    """A clip to validate on; `target` is its score on the universal scale."""

    clip_id: str
    uri: str
    num_samples: int
    dataset: str
    target: float


class Datasets:
    """To which dataset each of some clips belongs, and drawing clips: a dataset with p in proportion to
    min(clips, 7000), then one of its clips.

    `names` are sorted, `of` is the number of each clip's dataset, (clips,), `members` are each one's clips.
    """

    def __init__(self, datasets: Sequence[str]) -> None:
        names, self.of = np.unique(np.array(datasets, str), return_inverse=True)
        self.names: list[str] = names.tolist()
        self.counts = dict(zip(self.names, np.bincount(self.of).tolist(), strict=True))
        self.members = [np.flatnonzero(self.of == i) for i in range(len(names))]
        capped = np.minimum([len(members) for members in self.members], _CAP)
        self._ends = np.cumsum(capped) / np.sum(capped)

    def draw(self, rng: np.random.Generator) -> int:
        """The number of a clip."""
        dataset = int(np.searchsorted(self._ends, rng.random(), side="right"))
        members = self.members[min(dataset, len(self.members) - 1)]
        return int(members[rng.integers(len(members))])


class Labeled:
    """Scored clips of one split."""

    def __init__(self, rows: pa.Table, transform: LabelTransform) -> None:
        rows = rows.combine_chunks()
        datasets = dataset_names(rows)
        self._rows = rows
        self.datasets = Datasets(datasets)
        self._targets = np.array([transform(*pair) for pair in zip(rows["mos"].to_pylist(), datasets, strict=True)])
        self._lengths = np.floor(rows["duration_s"].to_numpy() * audio.SAMPLE_RATE + 1e-6).astype(np.int64)
        self._warned: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int, crop: float, crop_samples: int) -> tuple[np.ndarray, float, str]:
        """At most `crop_samples` of a clip, its target and its address.

        For a clip that cannot be used its dataset's next one is taken, with a warning: also a pure function.
        """
        members = self.datasets.members[self.datasets.of[number]]
        place = int(np.searchsorted(members, number))
        for other in np.take(members, range(place, place + min(_TRIES, len(members))), mode="wrap").tolist():
            uri, length = self._rows["uri"][other].as_py(), int(self._lengths[other])
            start = int(crop * (max(0, length - crop_samples) + 1))
            try:
                wave = audio.load(uri, start, min(crop_samples, length))
                return wave, float(self._targets[other]), uri
            except UnreadableError:  # the storage's fault, perhaps: not to be trained around
                raise
            except AudioError as error:
                if other not in self._warned:
                    _LOG.warning("%s; the next clip of its dataset is taken instead", error)
                self._warned.add(other)
        name = self.datasets.names[self.datasets.of[number]]
        raise TableError(f"{_TRIES} clips of dataset {name} in a row cannot be used", "see the warnings above")

    def clips(self) -> Iterator[Clip]:
        """All of them, in order."""
        columns = (self._rows["clip_id"].to_pylist(), self._rows["uri"].to_pylist())
        names = [self.datasets.names[number] for number in self.datasets.of]
        return map(Clip, *columns, self._lengths.tolist(), names, self._targets.tolist())


def manifest(source: str, headers: bool = True) -> pa.Table:
    """Scored clips as a `clip.v1` table: a manifest of the ingest job, or a list (CSV with path and mos, ...).

    The headers of a list's files are read here, or with `headers` false not at all: then durations and rates are 0.
    Raises `TableError` for a source without scores, or with one that is no MOS, and `AudioError` for a list's file
    that cannot be used.
    """
    rows = table.read(source, "clip.v1") if source.endswith(".parquet") else _listed(source, headers)
    rows = rows.filter(pc.equal(rows["kind"], "speech"))
    scored = rows.filter(pc.is_valid(rows["mos"]))
    if not len(scored):
        raise TableError(f"{source}: none of its {len(rows)} speech clips has a score", "give a column mos, 1 to 5")
    wrong = scored.filter(pc.invert(pc.and_(pc.less_equal(1, scored["mos"]), pc.less_equal(scored["mos"], 5))))
    if len(wrong):
        raise TableError(f"{source}: {wrong['uri'][0]} has mos {wrong['mos'][0]}", "give scores from 1 to 5")
    if unscored := len(rows) - len(scored):
        _LOG.warning("%s: %d of %d speech clips have no mos and are left out", source, unscored, len(rows))
    return scored


def held_out(source: str, headers: bool = True) -> pa.Table:
    """Of `manifest(source, headers)`, the clips of split `test` where there are some, else all but those of `train`.

    Raises `TableError` where there is none, too.
    """
    clips = manifest(source, headers)
    splits = np.array(clips["split"].to_pylist(), object)
    wanted = splits == "test" if (splits == "test").any() else splits != "train"
    if not wanted.any():
        raise TableError(f"{source}: its clips are all of split train", "give some that trained no student")
    return clips.filter(pa.array(wanted))


def dataset_names(clips: pa.Table) -> list[str]:
    """The dataset of each clip; its corpus where it names none."""
    names: list[str] = pc.coalesce(clips["dataset"], clips["corpus"], pa.scalar("labeled")).to_pylist()
    return names


def split(clips: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Clips to train and to validate on: by their column `split`, else one of twenty speakers (or clips) validates."""
    named = clips["split"].to_pylist()
    if unknown := set(named) - {None, *_SPLITS}:
        raise TableError(f"split {', '.join(sorted(unknown))} is unknown", f"choose from {', '.join(_SPLITS)}")
    if any(named):
        is_validation = np.array([name == "validation" for name in named])
        is_train = np.array([name in (None, "train") for name in named])
    else:
        groups = pc.coalesce(clips["speaker"], clips["clip_id"]).to_pylist()
        numbers = np.array([int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) for group in groups])
        is_validation = numbers % _VALIDATION_SHARE == 0
        if not is_validation.any() and len(set(groups)) > 1:  # a small set: the group with the smallest hash
            is_validation = numbers == numbers.min()
        is_train = ~is_validation
    return clips.filter(pa.array(is_train)), clips.filter(pa.array(is_validation))


def _listed(source: str, headers: bool) -> pa.Table:
    rows = list(listing.rows(source))
    for number, row in enumerate(rows):
        try:
            row["mos"] = float(row["mos"]) if row.get("mos") is not None else None
        except ValueError:
            raise TableError(f"{source}: row {number + 1} has mos {row['mos']!r}", "give a number") from None
    with ThreadPoolExecutor(_THREADS) as threads:
        return table.from_rows(threads.map(partial(_with_header, headers), rows), "clip.v1")


def _with_header(is_read: bool, row: dict[str, Any]) -> dict[str, Any]:
    header = {"duration_s": 0.0, "sample_rate": 0, "channels": 0}
    if is_read:
        info = audio.probe(row["uri"])
        header = {"duration_s": info.duration_s, "sample_rate": info.sample_rate, "channels": info.channels}
    return {**row, **header, "clip_id": clip_id(row["kind"], row["uri"])}
