"""Clips that listeners scored: their splits, and drawing and reading them."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from speechdistill.data import listed
from speechdistill.data.clips import clip_id
from speechdistill.data.corpora import listing
from speechdistill.data.label_scale import LabelTransform
from speechdistill.data.listed import Row
from speechdistill.io import audio, audio_files, table
from speechdistill.io.errors import AudioError, TableError, UnreadableError, UserError

_LOG = logging.getLogger(__name__)
_CAP = 7_000  # clips that a dataset counts as, at most (Distill-MOS caps above 7,000; the form is ours)
_VALIDATION_SHARE = 20  # one in so many validates, if clips have no splits
_TRIES = 20  # clips tried instead of an unusable one
_THREADS = 16


class ScoredClip(NamedTuple):
    """A clip for validation; `target` is its score on the universal scale."""

    clip_id: str
    uri: str
    num_samples: int
    dataset: str
    target: float


class Datasets:
    """Datasets of clips, and random clips: first a dataset with p ~ min(clips, 7000), then one of its clips.

    `names` are sorted, `of` has the number of each clip's dataset, shape (clips,), and `members` the clips of each
    dataset.
    """

    def __init__(self, datasets: Sequence[str]) -> None:
        names, self.of = np.unique(np.array(datasets, str), return_inverse=True)
        self.names: list[str] = names.tolist()
        self.counts = dict(zip(self.names, np.bincount(self.of).tolist(), strict=True))
        self.members = [np.flatnonzero(self.of == i) for i in range(len(names))]
        capped = np.minimum([len(members) for members in self.members], _CAP)
        self._ends = np.cumsum(capped) / np.sum(capped)

    def draw(self, rng: np.random.Generator) -> int:
        """Draw the number of a clip."""
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
        self._lengths = audio.num_samples(rows["duration_s"].to_numpy())
        self._warned: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int, crop: float, crop_samples: int) -> tuple[np.ndarray, float, str]:
        """Return at most `crop_samples` of a clip, its target and its address.

        An unusable clip is replaced by the next clip of its dataset, with a warning. The choice is deterministic.
        """
        members = self.datasets.members[self.datasets.of[number]]
        place = int(np.searchsorted(members, number))
        for other in np.take(members, range(place, place + min(_TRIES, len(members))), mode="wrap").tolist():
            uri, length = self._rows["uri"][other].as_py(), int(self._lengths[other])
            start = int(crop * (max(0, length - crop_samples) + 1))
            try:
                wave = audio.load(uri, start, min(crop_samples, length))
                return wave, float(self._targets[other]), uri
            except UnreadableError:  # perhaps the storage fails: do not train without its clips
                raise
            except AudioError as error:
                if other not in self._warned:
                    _LOG.warning("%s; the next clip of its dataset is used instead", error)
                self._warned.add(other)
        name = self.datasets.names[self.datasets.of[number]]
        raise TableError(f"{_TRIES} clips of dataset {name} in a row cannot be used", "see the warnings above")

    def clips(self) -> Iterator[ScoredClip]:
        """Return an iterator over all clips, in order."""
        columns = (self._rows["clip_id"].to_pylist(), self._rows["uri"].to_pylist())
        names = [self.datasets.names[number] for number in self.datasets.of]
        return map(ScoredClip, *columns, self._lengths.tolist(), names, self._targets.tolist())


def manifest(source: str, headers: bool = True) -> pa.Table:
    """Read scored clips for training as a `clip.v1` table, from a manifest of ingest or a list with path and mos.

    The headers of the files of a list are read too, unless `headers` is false: then durations and rates are 0. Raises
    `TableError` for a source without scores or with faulty rows (`data/listed.py`), and `AudioError` for an unusable
    file of a list.
    """
    clips, about = _scored(source, headers)
    splits = Counter(clips["split"].to_pylist())
    _log(about, len(clips) - splits["test"], {"of split test": splits["test"]})
    return clips


def held_out(source: str, headers: bool = True) -> pa.Table:
    """Read scored clips for evaluation, like `manifest`: those of split `test` if any, else all but those of `train`.

    Also raises `TableError` if no clip remains.
    """
    clips, about = _scored(source, headers)
    splits = np.array(clips["split"].to_pylist(), object)
    wanted = splits == "test" if (splits == "test").any() else splits != "train"
    if not wanted.any():
        raise TableError(f"{source}: its clips are all of split train", "give clips that no student was trained on")
    _log(about, wanted.sum(), Counter(f"of split {name}" for name in splits[~wanted]))
    return clips.filter(pa.array(wanted))


def dataset_names(clips: pa.Table) -> list[str]:
    """Return the dataset of each clip, or its corpus if it has none."""
    names: list[str] = pc.coalesce(clips["dataset"], clips["corpus"], pa.scalar("labeled")).to_pylist()
    return names


def split(clips: pa.Table) -> tuple[pa.Table, pa.Table]:
    """Split clips into training and validation, by column `split`; if empty, 1 of 20 speakers (or clips) validates."""
    named = [listed.split_name(name) for name in clips["split"].to_pylist()]
    if any(named):
        is_validation = np.array([name == "validation" for name in named])
        is_train = np.array([name in (None, "train") for name in named])
    else:
        groups = pc.coalesce(clips["speaker"], clips["clip_id"]).to_pylist()
        numbers = np.array([int(hashlib.sha256(group.encode()).hexdigest()[:8], 16) for group in groups])
        is_validation = numbers % _VALIDATION_SHARE == 0
        if not is_validation.any() and len(set(groups)) > 1:  # a small set: the group with the smallest hash validates
            is_validation = numbers == numbers.min()
        is_train = ~is_validation
    return clips.filter(pa.array(is_train)), clips.filter(pa.array(is_validation))


def _scored(source: str, headers: bool) -> tuple[pa.Table, str]:
    """Return the scored speech clips of `source`, and a line that accounts for its rows."""
    if source.lower().endswith(".parquet") and not {"clip_id", "duration_s"} - set(table.column_names(source)):
        rows, about = _stored(source)
    else:
        rows, about = _listed(source, headers)
    speech = rows.filter(pc.equal(rows["kind"], "speech"))
    scored = speech.filter(pc.is_valid(speech["mos"]))
    if not len(scored):
        raise TableError(f"{source}: none of its {len(speech)} speech clips has a score", "give a column mos, 1 to 5")
    wrong = scored.filter(pc.invert(pc.and_(pc.less_equal(1, scored["mos"]), pc.less_equal(scored["mos"], 5))))
    if len(wrong):
        raise TableError(f"{source}: {wrong['uri'][0]} has mos {wrong['mos'][0]}", "give scores from 1 to 5")
    other, unscored = len(rows) - len(speech), len(speech) - len(scored)
    return scored, about + "".join(
        f"; {count:,} left out, {why}" for count, why in ((other, "no speech"), (unscored, "without a score")) if count
    )


def _log(about: str, used: int, left: Mapping[str, int]) -> None:
    """Log a line that accounts for every row; a warning if some are left out."""
    left_out = "".join(f"; {count:,} left out, {why}" for why, count in left.items() if count)
    level = logging.WARNING if "left out" in about + left_out or " + " in about else logging.INFO
    _LOG.log(level, "%s%s; %s clips are used", about, left_out, f"{used:,}")


def _stored(source: str) -> tuple[pa.Table, str]:
    """Read a manifest, possibly of an earlier version or of another tool, such as several manifests in one."""
    rows = _normalised(table.read(source, "clip.v1"), source)
    _check_unchanged(rows, source)
    counts = Counter(rows=len(rows), files=len(rows), scored=len(rows) - rows["mos"].null_count)
    if len(rows["clip_id"].unique()) < len(rows):
        counts = Counter()
        rows = table.from_rows(_merged(source, rows.to_pylist, counts), "clip.v1")
    return rows, f"{source}: {listed.summary(counts)}"


def _check_unchanged(rows: pa.Table, source: str) -> None:
    """Raise `TableError` if local files have changed since they were ingested: their scores are of other audio.

    Objects would take a request each, and files that are gone are told when they are read.
    """
    known = rows.filter(pc.and_(pc.is_valid(rows["etag"]), pc.invert(pc.match_substring(rows["uri"], "://"))))
    columns = (known[name].to_pylist() for name in ("uri", "etag"))
    with ThreadPoolExecutor(_THREADS) as threads:
        changed = [uri for uri in threads.map(_if_changed, *columns) if uri]
    if changed:
        reason = (
            f"{len(changed):,} of its {len(rows):,} clips have changed since they were ingested, {changed[0]} first"
        )
        raise TableError(f"{source}: {reason}", "rerun ingest, with their scores if these are others now")


def _if_changed(uri: str, etag: str) -> str | None:
    try:
        return uri if audio_files.version(uri)[1] != etag else None  # of a local file it has the size, too
    except (OSError, UserError):
        return None


def _normalised(rows: pa.Table, source: str) -> pa.Table:
    """Replace NaN scores by null and old spellings of splits by current ones."""
    try:
        names = {name: listed.split_name(name) for name in rows["split"].unique().to_pylist()}
    except TableError as error:
        raise TableError(f"{source}: {error.reason}", error.fix) from None
    columns = {
        "split": pa.array([names[name] for name in rows["split"].to_pylist()], pa.string()),
        "mos": pc.if_else(pc.is_nan(rows["mos"]), None, rows["mos"]),
    }
    for name, column in columns.items():
        rows = rows.set_column(rows.schema.get_field_index(name), rows.schema.field(name), column)
    return rows


def _listed(source: str, headers: bool) -> tuple[pa.Table, str]:
    counts: Counter[str] = Counter()
    rows = _merged(source, lambda: listing.rows(source), counts)
    with ThreadPoolExecutor(_THREADS) as threads:
        clips = table.from_rows(threads.map(partial(_with_header, headers), rows), "clip.v1")
    return clips, f"{source}: {listed.summary(counts)}"


def _merged(source: str, read: Callable[[], Iterable[Row]], counts: Counter[str]) -> list[Row]:
    """Return `listed.merged`; a single faulty row raises `TableError`, since figures without it would differ."""
    rows = list(listed.merged(read, counts))
    if faults := [row["error"] for row in rows if "error" in row]:
        reason = f"{len(faults):,} of {counts['rows']:,} rows cannot be used; the first is {faults[0].path}"
        raise TableError(f"{source}: {reason}: {faults[0].reason}", faults[0].fix)
    return rows


def _with_header(is_read: bool, row: Row) -> Row:
    header = audio.probe(row["uri"]).columns() if is_read else {"duration_s": 0.0, "sample_rate": 0, "channels": 0}
    return {**row, **header, "clip_id": clip_id(row["kind"], row["uri"])}
