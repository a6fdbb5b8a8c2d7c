"""Folders, lists, tars and scored corpora -> `clips.parquet`: lengths are read in parallel on Ray, from headers if they
can be checked against the size of the file.

Work is committed in parts, so a killed run goes on where it stopped, and a run with new files adds just those, and the
clips that are not any more what they were. The last part that has a clip decides. `clips.parquet`, the good rows of
all parts as one file, is replaced at the end.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import chain, groupby, islice
from typing import Annotated, Any, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from tqdm import tqdm

from speechdistill.commands import report
from speechdistill.commands.guarded import guarded
from speechdistill.commands.outputs import check_own
from speechdistill.data import listed, listening_tests
from speechdistill.data.clips import clip_id
from speechdistill.data.corpora import folder, listing, webdataset
from speechdistill.data.corpus import HeldOut
from speechdistill.data.listening_tests import CorpusName
from speechdistill.engine import cluster
from speechdistill.engine.watch import stop_on_sigterm
from speechdistill.io import audio, audio_files, lease, outputs, storage, table, tar_files
from speechdistill.io.errors import AudioError, RunError, TableError, UnreadableError
from speechdistill.io.places import Seen, Skipped
from speechdistill.models.label import MIN_DURATION_S

_CHUNK_ROWS = 2_000
_KNOWN_ROWS = 50_000  # known clips that are sorted by their parts, so that each part is read seldom
_LISTED_ROWS = 500
_CONTENT = {"duration_s": "length", **dict.fromkeys(("size_bytes", "etag", "sample_rate", "channels"), "content")}
_THREADS = 8  # per task: reading a header is mostly waiting
_PART = re.compile(r"(clips|rejects)-(\d{6})\.parquet")
Row = dict[str, Any]


@dataclass(frozen=True)
class Ingest:
    """List audio files and read their headers into a clip manifest, OUT/clips.parquet.

    Running it again with more folders adds the new files and updates clips whose file or labels have changed since; ids
    are stable, and a label that is not given again stays. Files that cannot be used are in OUT/rejects.parquet with the
    reason, and are looked at again next time.
    """

    out: str
    """Folder of the manifest, a local path or URL."""
    speech: tuple[str, ...] = ()
    """Folders of speech recordings."""
    speaker_from: str | None = None
    """The speaker of each file of --speech: parent, the name of its folder, or a regular expression that is searched
    for in its address, whose group (or all that it matches) is the speaker, such as 'LibriSpeech/[^/]+/([0-9]+)/'.
    Training holds out whole speakers, and without them source clips."""
    noise: tuple[str, ...] = ()
    """Folders of noise recordings."""
    rir: tuple[str, ...] = ()
    """Folders of room impulse responses."""
    list: tuple[str, ...] = ()
    """CSV, TSV, JSONL or Parquet lists with a column path, and optionally kind, corpus, speaker, mos, ...; and
    WebDataset tars, read in place, whose .json members may give the same columns. Paths, URLs, globs such as 's3://bucket/*.tar',
    and ranges such as 's3://bucket/shard-{000000..000099}.tar'. A list's paths may be URLs or tars, too."""
    corpus: CorpusName | None = None
    """A corpus that listeners scored, read from --root as it is distributed, with its scores, systems and splits. Here
    csv is a folder with a labels.csv (wav_path, score, and where known system_id, input_id, dataset, split)."""
    root: str | None = None
    """Folder of the corpus as it is unpacked, a local path or URL."""
    held_out: HeldOut = "both"
    """Which clips of dns_2, plc_2022 and sig_2023 validate: both, those whose system and input are held out (the mixed
    ones are left out), or either, those with one of them, too. For another choice take another OUT."""


@guarded("the same command goes on where it stopped")
def command(config: Annotated[Ingest, tyro.conf.arg(name="")]) -> int:
    summary = run(config)
    kinds = ", ".join(f"{n:,} {kind} ({summary['hours'][kind]:.2f} h)" for kind, n in summary["clips"].items())
    print(f"{kinds} in {summary['manifest']}")
    for line in report.changes(summary["changes"]):
        print(line)
    if summary["rejected"]:
        print(f"{summary['rejected']:,} files were rejected; the reasons are in {config.out}/rejects.parquet")
    if summary.get("without_speaker"):
        print(f"--speaker-from {config.speaker_from} names no speaker of {summary['without_speaker']:,} files")
    if config.list:
        print(f"lists: {listed.summary(Counter(summary['lists']))}")
    return 0


def run(config: Ingest) -> dict[str, Any]:
    """Ingest everything `config` names and return the summary; raises `RunError` where nothing usable was found."""
    if not (config.speech or config.noise or config.rir or config.list or config.corpus):
        raise RunError(
            "nothing to ingest",
            "give --speech DIR, --noise DIR, --rir DIR, --list FILE, or --corpus NAME with --root DIR",
        )
    cluster.be_patient()
    out = storage.absolute(config.out)
    check_own(out, "ingest")
    outputs.try_outputs(
        *(f"{out}/{name}" for name in ("clips.parquet", "rejects.parquet", "ingest.json", "parts/clips"))
    )
    skipped = Skipped()
    files = webdataset.files(config.list, skipped)  # missing ones are told before the work
    folder.speaker("", config.speaker_from)
    told: Counter[str] = Counter()
    lines = listed.merged(lambda: chain.from_iterable(map(_lines, files)), told)
    labeled = scored_rows(config)
    config = replace(config, out=out, list=tuple(files))
    with lease.held(config.out, "ingest") as held:
        cluster.connect()
        stop_on_sigterm()
        whole: set[tuple[str, str]] = set()
        nameless: Counter[str] = Counter()
        rows = chain(labeled, _rows(config, lines, skipped, whole, nameless))
        changes = ingest_rows(rows, config.out, before_commit=held.check)
        _forget_rejects((clip_id(kind, tar) for kind, tar in whole), config.out)
        counts: dict[str, Any] = {"changes": dict(changes), "ignored_extensions": dict(skipped), "lists": dict(told)}
        if config.speaker_from:
            counts["without_speaker"] = nameless.total()
        summary = {**merge(config.out), **counts}
        print(*skipped.lines(), sep="\n", end="\n" if skipped else "", file=sys.stderr)
        storage.publish_json(summary, f"{config.out}/ingest.json")
    if not sum(summary["clips"].values()):
        raise RunError("no usable audio file was found", f"the reasons are in {config.out}/rejects.parquet")
    return summary


def scored_rows(config: Ingest) -> Iterator[Row]:
    """The rows of the corpus that `config` names, if it names one; raises `RunError` for half of a choice."""
    if (config.corpus is None) != (config.root is None):
        raise RunError(
            "one of --corpus and --root", "--corpus NAME and --root DIR, the folder of that corpus, are given together"
        )
    if config.corpus is None or config.root is None:
        return iter(())
    return iter(listening_tests.rows(config.corpus, config.root, config.held_out))


def ingest_rows(
    rows: Iterator[Row],
    out: str,
    probe: Callable[[Row], Row] | None = None,
    before_commit: Callable[[], None] = lambda: None,
) -> Counter[str]:
    """Read the headers of all rows not yet ingested or changed since, and commit them part by part; memory does not
    grow with rows. Returns how many known clips were `updated` (and in which columns), `rejected` or `unreadable`.
    """
    number = 1 + max((n for what in ("clips", "rejects") for n, _ in _parts(out, what)), default=-1)
    changes: Counter[str] = Counter()
    _listing.cache_clear()
    with tqdm(unit="file", dynamic_ncols=True, desc="headers") as bar:
        for probed in cluster.in_order(partial(_probed, probe=probe or _clip), _chunks(rows, out)):
            changes += probed.changes
            if len(probed.clips) or len(probed.rejects):
                before_commit()
                bar.update(_commit(probed, out, number))
                number += 1
    return changes


def merge(out: str) -> dict[str, Any]:
    """`clips.parquet` and `rejects.parquet` from all parts, and their sums."""
    clips: Counter[str] = Counter()
    seconds: Counter[str] = Counter()
    known = _known(out)

    def good() -> Iterator[pa.Table]:
        for number, path in _parts(out, "clips"):
            rows = table.read(path, "clip.v1")
            rows = rows.filter(pa.array(known.parts_of(_ids(rows["clip_id"])) == number))
            for kind, duration_s in zip(rows["kind"].to_pylist(), rows["duration_s"].to_pylist(), strict=True):
                clips[kind] += 1
                seconds[kind] += duration_s
            yield rows

    table.publish_stream(good(), "clip.v1", f"{out}/clips.parquet")
    rejects = _last_rejects(out, known)
    storage.publish(table.parquet_bytes(table.from_rows(rejects, "reject.v1")), f"{out}/rejects.parquet")
    return {
        "clips": dict(clips),
        "hours": {kind: value / 3600 for kind, value in seconds.items()},
        "rejected": len(rejects),
        "manifest": f"{out}/clips.parquet",
    }


def _rows(
    config: Ingest, lines: Iterator[Row], skipped: Skipped, whole: set[tuple[str, str]], nameless: Counter[str]
) -> Iterator[Row]:
    for kind, roots in (("speech", config.speech), ("noise", config.noise), ("rir", config.rir)):
        seen = Seen()
        for root in roots:
            for row in folder.rows(root, kind, skipped, seen):
                if speaker := folder.speaker(row["uri"], config.speaker_from) if kind == "speech" else None:
                    row["speaker"] = speaker
                nameless[kind] += kind == "speech" and speaker is None
                yield row
    yield from webdataset.rows(lines, skipped, whole)


def _lines(file: str) -> Iterator[Row]:
    return iter([{"uri": file, "kind": "speech"}]) if webdataset.is_tar(file) else listing.rows(file)


class _Known(NamedTuple):
    """The clips that parts have: sorted ids, and the number of the last part that has each."""

    ids: np.ndarray
    parts: np.ndarray

    def parts_of(self, ids: np.ndarray) -> np.ndarray:
        """The part of each clip; -1 for one that is not known."""
        places = np.minimum(np.searchsorted(self.ids, ids), len(self.ids) - 1)
        return np.where(self.ids[places] == ids, self.parts[places], -1) if len(self.ids) else np.full(len(ids), -1)


def _known(out: str) -> _Known:
    """Clips that were not rejected since: those are looked at again."""
    ids, parts, is_good = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], [np.zeros(0, bool)]
    for what, column in (("clips", "clip_id"), ("rejects", "id")):
        for number, path in _parts(out, what):
            ids.append(_ids(table.read(path, f"{what[:-1]}.v1", [column])[column]))
            parts.append(np.full(len(ids[-1]), number, np.int32))
            is_good.append(np.full(len(ids[-1]), what == "clips"))
    all_ids, all_parts = np.concatenate(ids), np.concatenate(parts)
    order = np.lexsort((all_parts, all_ids))
    all_ids = all_ids[order]
    is_last = np.append(all_ids[1:] != all_ids[:-1], np.ones(min(1, len(all_ids)), bool))
    kept = is_last & np.concatenate(is_good)[order]
    return _Known(all_ids[kept], all_parts[order][kept])


def _ids(column: pa.ChunkedArray) -> np.ndarray:
    return np.array([int(identity, 16) for identity in column.to_pylist()], np.uint64)


def _chunks(rows: Iterator[Row], out: str) -> Iterator[list[Row]]:
    """Chunks of the rows that are not seen earlier in this run; those of known clips have `known`, the stored row."""
    known, seen = _known(out), _Seen()
    waiting: list[tuple[int, Row]] = []
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        named: dict[int, Row] = {}
        for row in chunk:
            named.setdefault(int(clip_id(str(row["kind"]), row["uri"]), 16), row)
        unseen = seen.add(named)
        parts = known.parts_of(np.array(unseen, np.uint64)).tolist()
        if new := [named[identity] for identity, part in zip(unseen, parts, strict=True) if part < 0]:
            yield new
        waiting += [(part, named[identity]) for identity, part in zip(unseen, parts, strict=True) if part >= 0]
        if len(waiting) >= _KNOWN_ROWS:
            yield from _with_stored(waiting, out)
            waiting = []
    yield from _with_stored(waiting, out)


class _Seen:
    """The ids of this run. A set of all would take a dozen times the eight bytes that each has in a sorted array."""

    def __init__(self) -> None:
        self._sorted, self._recent = np.zeros(0, np.uint64), set[int]()

    def add(self, ids: Collection[int]) -> list[int]:
        """Those that are not there yet."""
        all_ids = np.fromiter(ids, np.uint64, len(ids))
        places = np.minimum(np.searchsorted(self._sorted, all_ids), len(self._sorted) - 1)
        if len(self._sorted):
            all_ids = all_ids[self._sorted[places] != all_ids]
        new = [identity for identity in all_ids.tolist() if identity not in self._recent]
        self._recent.update(new)
        if len(self._recent) > max(100_000, len(self._sorted) // 8):
            recent = np.fromiter(self._recent, np.uint64, len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent.clear()
        return new


def _with_stored(rows: list[tuple[int, Row]], out: str) -> Iterator[list[Row]]:
    """Chunks of known rows, by their parts, with what is stored of each. (Read here: workers need not see `out`.)"""
    _note_versions([row for _, row in rows])
    rows.sort(key=lambda pair: pair[0])
    chunk: list[Row] = []
    for part, group in groupby(rows, lambda pair: pair[0]):
        found = table.read(f"{out}/parts/clips-{part:06d}.parquet", "clip.v1").to_pylist()
        stored = {row["clip_id"]: row for row in found}
        for _, row in group:
            chunk.append({**row, "known": stored[clip_id(str(row["kind"]), row["uri"])]})
            if len(chunk) == _CHUNK_ROWS:
                yield chunk
                chunk = []
    if chunk:
        yield chunk


def _note_versions(rows: list[Row]) -> None:
    """Add sizes and etags of objects whose folder many of the rows share, from its listing: a request for a thousand.
    (The others are asked for one by one, by the workers.)
    """
    folders: dict[str, list[Row]] = {}
    for row in rows:
        if re.match(r"(?!https?:)\w+://", row["uri"]) and "::" not in row["uri"] and "#" not in row["uri"]:
            folders.setdefault(row["uri"].rpartition("/")[0], []).append(row)
    for folder_uri, inside in folders.items():
        if len(inside) < _LISTED_ROWS:
            continue
        with suppress(Exception):  # of the storage, which the workers meet again
            listing = _listing(folder_uri)
            for row in inside:
                row.update(listing.get(row["uri"].rpartition("/")[2], {}))


@lru_cache(maxsize=1)  # rows of a folder mostly follow each other
def _listing(folder_uri: str) -> dict[str, Row]:
    """The versions of a folder's objects, by name; of those that have an etag."""
    fs, path = fsspec.url_to_fs(folder_uri, use_listings_cache=False)
    return {
        info["name"].rpartition("/")[2]: {"size_bytes": info["size"], "etag": str(etag).strip('"')}
        for info in fs.ls(path, detail=True)
        if (etag := info.get("ETag") or info.get("etag"))
    }


class _Probed(NamedTuple):
    """The good and the rejected rows of a chunk, and what has changed of known clips."""

    clips: pa.Table
    rejects: pa.Table
    changes: Counter[str]


def _probed(chunk: list[Row], probe: Callable[[Row], Row]) -> _Probed:
    """Nothing that a file or a list's line holds may stop the run."""
    cluster.be_patient()
    with ThreadPoolExecutor(_THREADS) as threads:
        results = list(threads.map(partial(_tried, probe), chunk))
    good = [result for result in results if isinstance(result, dict)]
    try:
        clips = table.from_rows(good, "clip.v1")
    except TableError:  # row by row, to find which; otherwise it would cost more than reading the headers
        results = [_valid(result) for result in results]
        clips = table.from_rows([result for result in results if isinstance(result, dict)], "clip.v1")
    changes: Counter[str] = Counter()
    for row, result in zip(chunk, results, strict=True):
        if "known" in row:
            changes.update(_changes(row["known"], result))
    rejects = [
        {**_reason(result), "id": clip_id(str(row["kind"]), row["uri"])}
        for row, result in zip(chunk, results, strict=True)
        if isinstance(result, Exception) and not _is_kept(row, result)
    ]
    return _Probed(clips, table.from_rows(rejects, "reject.v1"), changes)


def _tried(probe: Callable[[Row], Row], row: Row) -> Row | Exception | None:
    """The row as it is stored, its error, or None for a known clip that is as it was."""
    known = row.get("known", {})
    row = {key: value for key, value in row.items() if key != "known"}
    try:
        if known and _is_same(row, known):
            return None
        return {**known, **probe(row), "clip_id": clip_id(str(row["kind"]), row["uri"])}
    except Exception as error:  # whatever a file or a line holds: its row is rejected with it
        return error


def _is_same(row: Row, known: Row) -> bool:
    """Whether a known clip has the labels that are given, and the version of its file; False where that is not known,
    which its probe will tell.
    """
    try:
        now = {**row, **_version(row)}
    except Exception:
        return False
    return "error" not in row and all(known[key] == value for key, value in now.items() if value is not None)


def _is_kept(row: Row, error: Exception) -> bool:
    """Whether a known clip stays as it is: its storage did not answer, which may be temporary."""
    return "known" in row and isinstance(error, UnreadableError)


def _changes(known: Row, result: Row | Exception | None) -> set[str]:
    if result is None:
        return set()
    if isinstance(result, Exception):
        return {"unreadable" if isinstance(result, UnreadableError) else "rejected"}
    names = {_CONTENT.get(key, key) for key, value in result.items() if known[key] != value}
    return {"updated", *names}


def _valid(result: Row | Exception | None) -> Row | Exception | None:
    try:
        if isinstance(result, dict):
            table.from_rows([result], "clip.v1")
        return result
    except TableError as error:
        return error


def _reason(error: Exception) -> Row:
    message = str(error).encode(errors="backslashreplace").decode()
    return {"stage": "ingest", "error_type": type(error).__name__, "message": message}


def _clip(row: Row) -> Row:
    uri = row["uri"]
    if "error" in row:  # what its corpus found out already
        raise row["error"]
    if any("\ud800" <= character <= "\udfff" for character in uri):
        raise AudioError(uri, "its name is not UTF-8, and tables hold only UTF-8", "rename the file")
    info = audio.probe(uri)
    if row["kind"] == "speech" and info.duration_s < MIN_DURATION_S:
        raise AudioError(uri, f"{info.duration_s:.4f} s of speech cannot be judged", "leave it out")
    return {
        **row,
        "duration_s": info.duration_s,
        "sample_rate": info.sample_rate,
        "channels": info.channels,
        **_version(row),
    }


def _version(row: Row) -> Row:
    member = tar_files.parse(row["uri"])
    if member and "etag" in row:  # the tar's: asking again would be a request for each member
        return {"size_bytes": member.size}
    if "size_bytes" in row:  # the listing of its folder told it
        return {}
    size, etag = audio_files.version(row["uri"])
    return {"size_bytes": size, "etag": etag}


def _commit(probed: _Probed, out: str, number: int) -> int:
    # Clips last: a kill in between leaves rejects of files that are looked at again.
    storage.publish(table.parquet_bytes(probed.rejects), f"{out}/parts/rejects-{number:06d}.parquet")
    storage.publish(table.parquet_bytes(probed.clips), f"{out}/parts/clips-{number:06d}.parquet")
    return len(probed.clips) + len(probed.rejects)


def _parts(out: str, what: str) -> list[tuple[int, str]]:
    fs, path = storage.file_system(f"{out}/parts")
    fs.invalidate_cache()
    with storage.access(f"{out}/parts"):
        names = [os.path.basename(name) for name in fs.ls(path, detail=False)] if fs.exists(path) else []  # noqa: PTH119
    found = [(int(match[2]), match[0]) for name in names if (match := _PART.fullmatch(name)) and match[1] == what]
    return [(number, f"{out}/parts/{name}") for number, name in sorted(found)]


def _forget_rejects(ids: Iterable[str], out: str) -> None:
    """Tars that are whole by now: no clip has their id, by which a mended file is told from others."""
    mended = pa.array(ids, pa.string())
    for _, path in _parts(out, "rejects") if len(mended) else []:
        rejects = table.read(path, "reject.v1")
        kept = rejects.filter(pc.invert(pc.is_in(rejects["id"], mended)))
        if len(kept) < len(rejects):
            storage.publish(table.parquet_bytes(kept), path)


def _last_rejects(out: str, known: _Known) -> list[Row]:
    """The latest reason of every file that is still rejected: one mended since then is among the clips."""
    rejects = {
        row["id"]: row for _, path in _parts(out, "rejects") for row in table.read(path, "reject.v1").to_pylist()
    }
    parts = known.parts_of(np.array([int(identity, 16) for identity in rejects], np.uint64))
    return [row for row, part in zip(rejects.values(), parts.tolist(), strict=True) if part < 0]
