"""Samples of label runs that are held out of training: some select the best checkpoint, others test models.

Whole speakers are held out, or source clips if speakers are not known, by a hash of the name: a function of the run
alone. Samples that contain a held-out clip do not train, even if the clip is only babble. Noise and room recordings are
shared.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from speechdistill.engine.finished_run import LabelRun
from speechdistill.io import fingerprint, storage, table
from speechdistill.io.errors import TableError

_SHARE, _NOT_ENOUGH = 2**32 // 40, 2**32  # of all hashes: a part has the groups whose hash is at most the first
_ENOUGH, _FEWEST, _SMALL = 16, 3, 8  # samples of a part: at least 16; of a small run an eighth, but at least 3
_MOST = 1_000  # samples of a part that are read: each may need a row group of its own
_EARLIER_SHARE = 20  # earlier versions held out one row group of so many
_AT_ONCE = 1 << 16  # names that are Python objects at a time

_NO_PLACES = np.zeros(0, np.int64)


@dataclass(frozen=True)
class HeldOut:
    """Sorted places of samples in a run: `validation` selects the best checkpoint, `test` is for comparing models.
    `left_out`, both and other samples with their clips, does not train. `about` is JSON for the provenance; None under
    the rule by row groups.
    """

    validation: np.ndarray = field(default_factory=lambda: _NO_PLACES)
    test: np.ndarray = field(default_factory=lambda: _NO_PLACES)
    left_out: np.ndarray = field(default_factory=lambda: _NO_PLACES)
    about: dict[str, Any] | None = None


def held_out(runs: Sequence[LabelRun]) -> tuple[HeldOut, ...]:
    """Return the held-out samples of each run. The runs train together: a clip held out of one does not
    train in any.
    """
    sources = [_Sources.of(run) for run in runs]
    parts = [_parts(one) for one in sources]
    test = _clips(sources, [part.test for part in parts])
    held = pa.chunked_array([*test.chunks, *_clips(sources, [part.validation for part in parts]).chunks], pa.string())
    return tuple(_held_out(*of_run, test, held) for of_run in zip(sources, parts, strict=True))


def by_row_groups(run: LabelRun, validates: bool) -> HeldOut:
    """Return what earlier versions held out, to resume their runs: one row group of 20 if the run `validates`."""
    if not validates:
        return HeldOut()
    count = min(max(1, len(run.groups.sizes) // _EARLIER_SHARE), len(run.groups.sizes) - 1)
    groups = np.unique(np.linspace(0, len(run.groups.sizes) - 1, count + 2).astype(np.int64)[1:-1])
    places = np.flatnonzero(np.isin(np.repeat(np.arange(len(run.groups.sizes)), run.groups.sizes), groups))
    return HeldOut(places, _NO_PLACES, places)


def about(run: LabelRun, held: HeldOut | None = None) -> dict[str, Any]:
    """Return the description of a label run for the provenance of models trained or tested on it."""
    known = {"fingerprint": run.fingerprint, "weight": run.weight}
    clips = run.configuration.get("clips_sha256")
    return known if held is None else {**known, "clips_sha256": clips, "held_out": held.about}


class _Sources(NamedTuple):
    """The source `clip` and the `group` (an index into `names`) of each sample. Sample i has the clips
    `clips[offsets[i]:offsets[i + 1]]`.
    """

    clip: pa.Array
    group: np.ndarray
    names: pa.Array
    by: str
    clips: pa.Array
    offsets: np.ndarray

    @classmethod
    def of(cls, run: LabelRun) -> "_Sources":
        rows = run.groups.columns("sample_id", "speaker", "clip_ids").combine_chunks()
        sample_id, speaker, lists = (rows[name].combine_chunks() for name in rows.column_names)
        clips, offsets = lists.values, lists.offsets.to_numpy()
        clip = clips.take(pa.array(offsets[:-1], mask=offsets[:-1] == offsets[1:]))
        # A generated sample has no source clip, so that noise may come first.
        clip = pc.if_else(pc.is_in(clip, _recordings(run)), pa.scalar(None, pa.string()), clip)
        groups = pc.coalesce(speaker, clip, sample_id.cast(pa.string())).dictionary_encode()
        by = "speaker" if speaker.null_count < len(speaker) else "clip"
        return cls(clip, groups.indices.to_numpy(), groups.dictionary, by, clips, offsets)

    def having(self, some: pa.ChunkedArray) -> np.ndarray:
        """Whether each sample has any of these clips."""
        counts = np.concatenate(
            [[0], np.cumsum(pc.is_in(self.clips, some.combine_chunks()).to_numpy(zero_copy_only=False))]
        )
        having: np.ndarray = counts[self.offsets[1:]] > counts[self.offsets[:-1]]
        return having


class _Parts(NamedTuple):
    """Masks of the samples in each part, and the largest hash of each; `too_few` is the reason if none are held out."""

    test: np.ndarray
    validation: np.ndarray
    below: tuple[int, int] = (0, 0)
    too_few: str | None = None


def _recordings(run: LabelRun) -> pa.Array:
    """Return the ids of noise and room recordings, from the run's copy of the manifest."""
    manifest = f"{run.out}/clips.parquet"
    fs, path = storage.file_system(manifest)
    with storage.access(manifest):
        if not fs.exists(path):
            return pa.array([], pa.string())
    if run.configuration.get("clips_sha256") not in (None, fingerprint.of_file(manifest)):
        reason = f"{manifest} was changed since the run was started: its speech clips are not known any more"
        raise TableError(reason, "rerun pseudolabel, which restores it")
    clips = table.read(manifest, "clip.v1", ["clip_id", "kind"])
    return clips.filter(pc.not_equal(clips["kind"], "speech"))["clip_id"].combine_chunks()


def _parts(sources: _Sources) -> _Parts:
    """Return both parts, each by a hash of its own; empty parts if less than half of the samples were left to train on.

    Groups with more than a quarter of the samples always train.
    """
    hashes, counts = _hashes(sources.names), np.bincount(sources.group)
    fits = 4 * counts <= counts.sum()
    tests = _below(hashes[fits, 0], counts[fits], counts.sum())
    is_test = fits & (hashes[:, 0] <= tests)
    fits &= ~is_test
    validates = _below(hashes[fits, 1], counts[fits], counts.sum())
    is_validation = fits & (hashes[:, 1] <= validates)
    if max(tests, validates) == _NOT_ENOUGH or counts[is_test | is_validation].sum() > counts.sum() / 2:
        none = np.zeros(len(sources.group), bool)
        what = "speakers" if sources.by == "speaker" else "clips"
        return _Parts(
            none, none, too_few=f"{counts.sum()} samples of {len(counts)} {what} are too few to hold some out"
        )
    return _Parts(is_test[sources.group], is_validation[sources.group], (tests, validates))


def _below(hashes: np.ndarray, counts: np.ndarray, num_samples: int) -> int:
    """Return the largest hash of a part: a 40th of all hashes, or more until the part has enough samples."""
    order = np.argsort(hashes)
    enough = max(_FEWEST, min(_ENOUGH, num_samples // _SMALL))
    reached = np.flatnonzero(np.cumsum(counts[order]) >= enough)
    return max(_SHARE, int(hashes[order[reached[0]]])) if len(reached) else _NOT_ENOUGH


def _hashes(names: pa.Array) -> np.ndarray:
    """Return two independent 32-bit numbers for each name, shape (names, 2)."""
    digests = bytearray()
    for start in range(0, len(names), _AT_ONCE):
        some = names.slice(start, _AT_ONCE).to_pylist()
        digests += b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in some)
    return np.frombuffer(digests, ">u4").astype(np.int64).reshape(-1, 2)


def _clips(sources: Sequence[_Sources], which: Sequence[np.ndarray]) -> pa.ChunkedArray:
    """Return the source clips of these samples, each once."""
    chunks = [one.clip.filter(pa.array(mask)) for one, mask in zip(sources, which, strict=True)]
    return pa.chunked_array([pc.unique(pa.chunked_array(chunks, pa.string())).drop_null()], pa.string())


def _held_out(sources: _Sources, parts: _Parts, test: pa.ChunkedArray, held: pa.ChunkedArray) -> HeldOut:
    """Return the places of one run; `test` and `held` are the clips of all runs that test, and that do not train."""
    is_validation = parts.validation & ~sources.having(test)
    left_out = np.flatnonzero(parts.test | parts.validation | sources.having(held))
    if parts.too_few:
        return HeldOut(left_out=left_out, about={"too_few": parts.too_few})
    about = {
        "by": sources.by,
        "test": _about(sources, parts.test, parts.below[0]),
        "validation": _about(sources, is_validation, parts.below[1]),
    }
    return HeldOut(_some(np.flatnonzero(is_validation)), _some(np.flatnonzero(parts.test)), left_out, about)


def _about(sources: _Sources, mask: np.ndarray, below: int) -> dict[str, Any]:
    """Describe a part by its samples and source clips. It has the groups whose name's hash is at most `hash_up_to`."""
    clips = _clips([sources], [mask]).to_pylist()
    return {
        "samples": int(mask.sum()),
        "clips": len(clips),
        "clips_sha256": fingerprint.of(sorted(clips)),
        "hash_up_to": below,
    }


def _some(places: np.ndarray) -> np.ndarray:
    chosen = np.linspace(0, len(places) - 1, min(len(places), _MOST))
    return np.asarray(places[np.unique(chosen.astype(np.int64))], np.int64)
