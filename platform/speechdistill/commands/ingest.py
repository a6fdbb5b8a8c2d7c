"""Folders, lists, tars and scored corpora -> `clips.parquet`: headers are read in parallel on Ray, nothing is decoded.

Work is committed in parts, so a killed run goes on where it stopped, and a run with new files adds just those.
`clips.parquet`, all good parts as one file, is replaced at the end.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro
from tqdm import tqdm

from speechdistill.commands.guarded import guarded
from speechdistill.data import listening_tests
from speechdistill.data.clips import clip_id
from speechdistill.data.corpora import folder, listing, webdataset
from speechdistill.data.corpus import HeldOut
from speechdistill.data.listening_tests import CorpusName
from speechdistill.engine import cluster
from speechdistill.io import audio, audio_files, outputs, storage, table, tar_files
from speechdistill.io.errors import AudioError, RunError, TableError
from speechdistill.io.places import Seen, Skipped
from speechdistill.models.label import MIN_DURATION_S

_CHUNK_ROWS = 2_000
_THREADS = 8  # per task: reading a header is mostly waiting
_PART = re.compile(r"(clips|rejects)-(\d{6})\.parquet$")
Row = dict[str, Any]


@dataclass(frozen=True)
class Ingest:
    """List audio files and read their headers into a clip manifest, OUT/clips.parquet.

    Running it again with more folders adds the new files; ids are stable. Files that cannot be used are in
    OUT/rejects.parquet with the reason, and are looked at again next time.
    """

    out: str
    """Folder of the manifest, a local path or URL."""
    speech: tuple[str, ...] = ()
    """Folders of speech recordings."""
    noise: tuple[str, ...] = ()
    """Folders of noise recordings."""
    rir: tuple[str, ...] = ()
    """Folders of room impulse responses."""
    list: tuple[str, ...] = ()
    """CSV, JSONL or Parquet lists with a column path, and optionally kind, corpus, speaker, mos, ...; and WebDataset
    tars, read in place, whose .json members may give the same columns. Paths, URLs, globs such as 's3://bucket/*.tar',
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
    if summary["rejected"]:
        print(f"{summary['rejected']:,} files were rejected; the reasons are in {config.out}/rejects.parquet")
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
    outputs.try_outputs(
        *(f"{out}/{name}" for name in ("clips.parquet", "rejects.parquet", "ingest.json", "parts/clips"))
    )
    skipped = Skipped()
    files = webdataset.files(config.list, skipped)  # missing ones are told before the work
    labeled = scored_rows(config)
    config = replace(config, out=out, list=tuple(files))
    cluster.connect()
    whole: set[tuple[str, str]] = set()
    ingest_rows(chain(labeled, _rows(config, skipped, whole)), config.out)
    _forget_rejects((clip_id(kind, tar) for kind, tar in whole), config.out)
    summary = {**merge(config.out), "ignored_extensions": dict(skipped)}
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


def ingest_rows(rows: Iterator[Row], out: str, probe: Callable[[Row], Row] | None = None) -> None:
    """Read the headers of all rows not yet ingested, and commit them part by part; memory does not grow with rows."""
    first = 1 + max((n for what in ("clips", "rejects") for n, _ in _parts(out, what)), default=-1)
    chunks = _new_chunks(rows, out)
    with tqdm(unit="file", dynamic_ncols=True, desc="headers") as bar:
        for number, tables in enumerate(cluster.in_order(partial(_probed, probe=probe or _clip), chunks), first):
            bar.update(_commit(tables, out, number))


def merge(out: str) -> dict[str, Any]:
    """`clips.parquet` and `rejects.parquet` from all parts, and their sums."""
    clips: Counter[str] = Counter()
    seconds: Counter[str] = Counter()

    def good() -> Iterator[pa.Table]:
        for _, path in _parts(out, "clips"):
            rows = table.read(path, "clip.v1")
            for kind, duration_s in zip(rows["kind"].to_pylist(), rows["duration_s"].to_pylist(), strict=True):
                clips[kind] += 1
                seconds[kind] += duration_s
            yield rows

    table.publish_stream(good(), "clip.v1", f"{out}/clips.parquet")
    rejects = _last_rejects(out)
    storage.publish(table.parquet_bytes(table.from_rows(rejects, "reject.v1")), f"{out}/rejects.parquet")
    return {
        "clips": dict(clips),
        "hours": {kind: value / 3600 for kind, value in seconds.items()},
        "rejected": len(rejects),
        "manifest": f"{out}/clips.parquet",
    }


def _rows(config: Ingest, skipped: Skipped, whole: set[tuple[str, str]]) -> Iterator[Row]:
    for kind, roots in (("speech", config.speech), ("noise", config.noise), ("rir", config.rir)):
        seen = Seen()
        for root in roots:
            yield from folder.rows(root, kind, skipped, seen)
    lines = chain.from_iterable(_lines(file) for file in config.list)
    yield from webdataset.rows(lines, skipped, whole)


def _lines(file: str) -> Iterator[Row]:
    return iter([{"uri": file, "kind": "speech"}]) if webdataset.is_tar(file) else listing.rows(file)


def _new_chunks(rows: Iterator[Row], out: str) -> Iterator[list[Row]]:
    """Chunks of rows that are neither in a good part nor seen earlier in this run."""
    # A set of all ids would take a dozen times the eight bytes that each has in a sorted array.
    known, recent = _known(out), set[int]()
    while chunk := list(islice(rows, _CHUNK_ROWS)):
        named = {int(clip_id(str(row["kind"]), row["uri"]), 16): row for row in chunk}
        ids = np.fromiter(named, np.uint64, len(named))
        places = np.minimum(np.searchsorted(known, ids), len(known) - 1)
        is_new = known[places] != ids if len(known) else np.ones(len(ids), bool)
        new = [identity for identity in ids[is_new].tolist() if identity not in recent]
        recent.update(new)
        if len(recent) > max(100_000, len(known) // 8):
            known = np.sort(np.concatenate([known, np.fromiter(recent, np.uint64, len(recent))]))
            recent.clear()
        if new:
            yield [named[identity] for identity in new]


def _known(out: str) -> np.ndarray:
    ids = [np.zeros(0, np.uint64)]
    for _, path in _parts(out, "clips"):
        column = table.read(path, "clip.v1", ["clip_id"])["clip_id"]
        ids.append(np.array([int(i, 16) for i in column.to_pylist()], np.uint64))
    return np.sort(np.concatenate(ids))


def _probed(chunk: list[Row], probe: Callable[[Row], Row]) -> tuple[pa.Table, pa.Table]:
    """The good and the rejected rows of a chunk: nothing that a file or a list's line holds may stop the run."""
    cluster.be_patient()
    with ThreadPoolExecutor(_THREADS) as threads:
        results = list(threads.map(partial(_tried, probe), chunk))
    good = [result for result in results if isinstance(result, dict)]
    try:
        clips = table.from_rows(good, "clip.v1")
    except TableError:  # row by row, to find which; otherwise it would cost more than reading the headers
        results = [_valid(result) for result in results]
        clips = table.from_rows([result for result in results if isinstance(result, dict)], "clip.v1")
    rejects = [
        {**_reason(result), "id": clip_id(str(row["kind"]), row["uri"])}
        for row, result in zip(chunk, results, strict=True)
        if isinstance(result, Exception)
    ]
    return clips, table.from_rows(rejects, "reject.v1")


def _tried(probe: Callable[[Row], Row], row: Row) -> Row | Exception:
    try:
        return {**probe(row), "clip_id": clip_id(str(row["kind"]), row["uri"])}
    except Exception as error:  # whatever a file or a line holds: its row is rejected with it
        return error


def _valid(result: Row | Exception) -> Row | Exception:
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
        **{key: _number(uri, row, key) for key in ("mos", "votes") if key in row},
        "duration_s": info.duration_s,
        "sample_rate": info.sample_rate,
        "channels": info.channels,
        **_version(row),
    }


def _number(uri: str, row: Row, key: str) -> float | int:
    try:
        value = float(row[key])
        if key == "votes" and not value.is_integer():
            raise ValueError
        return int(value) if key == "votes" else value
    except (ValueError, TypeError):
        raise AudioError(uri, f"{key} {row[key]!r} in its list is no number", "correct the list") from None


def _version(row: Row) -> Row:
    member = tar_files.parse(row["uri"])
    if member and "etag" in row:  # the tar's: asking again would be a request for each member
        return {"size_bytes": member.size}
    size, etag = audio_files.version(row["uri"])
    return {"size_bytes": size, "etag": etag}


def _commit(tables: tuple[pa.Table, pa.Table], out: str, number: int) -> int:
    clips, rejects = tables
    # Clips last: a kill in between leaves rejects of files that are looked at again.
    storage.publish(table.parquet_bytes(rejects), f"{out}/parts/rejects-{number:06d}.parquet")
    storage.publish(table.parquet_bytes(clips), f"{out}/parts/clips-{number:06d}.parquet")
    return len(clips) + len(rejects)


def _parts(out: str, what: str) -> list[tuple[int, str]]:
    fs, path = storage.file_system(f"{out}/parts")
    fs.invalidate_cache()
    with storage.access(f"{out}/parts"):
        names = [os.path.basename(name) for name in fs.ls(path, detail=False)] if fs.exists(path) else []  # noqa: PTH119
    found = [(int(match[2]), match[0]) for name in names if (match := _PART.search(name)) and match[1] == what]
    return [(number, f"{out}/parts/{name}") for number, name in sorted(found)]


def _forget_rejects(ids: Iterable[str], out: str) -> None:
    """Tars that are whole by now: no clip has their id, by which a mended file is told from others."""
    mended = pa.array(ids, pa.string())
    for _, path in _parts(out, "rejects") if len(mended) else []:
        rejects = table.read(path, "reject.v1")
        kept = rejects.filter(pc.invert(pc.is_in(rejects["id"], mended)))
        if len(kept) < len(rejects):
            storage.publish(table.parquet_bytes(kept), path)


def _last_rejects(out: str) -> list[Row]:
    """The latest reason of every file that is still rejected: one mended since then is among the clips."""
    rejects = {
        row["id"]: row for _, path in _parts(out, "rejects") for row in table.read(path, "reject.v1").to_pylist()
    }
    mended = pa.array(list(rejects), pa.string())
    for _, path in _parts(out, "clips"):
        ids = table.read(path, "clip.v1", ["clip_id"])["clip_id"]
        for found in ids.filter(pc.is_in(ids, mended)).to_pylist():
            rejects.pop(found, None)
    return list(rejects.values())
