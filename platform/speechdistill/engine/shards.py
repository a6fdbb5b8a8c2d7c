"""The commit protocol: part k is always the ids [k·R, (k+1)·R) and exactly one file.

`shards/part-<k>-<number of ids>.parquet` holds the part's good rows; its footer the rejects, the sums and a hash of the
rows. Name and content are functions of (run, k), so a retry, a late writer or a resume replaces a file with an equal
one. `manifest.parquet`, the list of files, and `summary.json` are written last.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from speechdistill.engine.footers import File, Footers, Part
from speechdistill.io import fingerprint, storage, table
from speechdistill.io.errors import RunError, TableError

REJECT = pa.schema([("reject_stage", pa.string()), ("reject_type", pa.string()), ("reject_message", pa.string())])
"""Status columns of a row between stages: null unless the row is rejected."""

ROW_GROUP = 16
"""Rows of a shard that a training lane reads at once."""
_DIFFERENCES = 12  # of two configurations, in a message
_NAME = re.compile(r"part-(\d{8})-(\d{8})\.parquet")


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Folder of a run's parts, and the ids of each part. `totals` maps a part's rows to additive numbers.

    `row_group` is the number of rows that a reader reads at once. `run` is the fingerprint of the run's identity. Each
    part carries it, so that parts of another run are recognised; an empty `run` turns that check off.
    """

    out: str
    schema: str
    id_column: str
    num_ids: int
    rows_per_part: int
    totals: Callable[[pa.Table], dict[str, Any]]
    row_group: int = ROW_GROUP
    run: str = ""

    @property
    def num_parts(self) -> int:
        return -(-self.num_ids // self.rows_per_part)

    def ids(self, k: int) -> range:
        return range(k * self.rows_per_part, min((k + 1) * self.rows_per_part, self.num_ids))

    def path(self, k: int, count: int) -> str:
        return f"{self.out}/shards/part-{k:08d}-{count:08d}.parquet"


@dataclass
class Totals:
    """Sums over committed parts: `sums` of the layout's `totals`, `reasons` of rejects by "stage.error type"."""

    labelled: int = 0
    rejected: int = 0
    sums: dict[str, Any] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    complete: bool = True

    @property
    def done(self) -> int:
        return self.labelled + self.rejected

    def add(self, part: Part) -> None:
        self.labelled += part.labelled
        self.rejected += len(part.rejects)
        self.reasons.update(f"{row['stage']}.{row['error_type']}" for row in part.rejects)
        for key, value in part.totals.items():
            self.sums[key] = np.add(self.sums.get(key, np.zeros_like(value)), value).tolist()


def claim(out: str, identity: Mapping[str, Any]) -> None:
    """Write `run.json`, or check that it has the same identity; raises `RunError` naming the differences."""
    mine = json.loads(json.dumps(identity))
    theirs = configuration(out)
    if theirs is None:
        if listed(out):
            raise RunError(f"{out} holds shards but no run.json", "choose another --out")
        storage.publish_json({"fingerprint": fingerprint.of(mine), "configuration": mine}, f"{out}/run.json")
    elif fingerprint.of(theirs) != fingerprint.of(mine):
        lines = "\n  ".join(_shortened(fingerprint.differences(theirs, mine)))
        raise RunError(
            f"{out} belongs to a run with another configuration (there -> here):\n  {lines}\n",
            "give the same configuration to resume that run, or another --out to start a new one",
        )


def _shortened(lines: list[str]) -> list[str]:
    others = len(lines) - _DIFFERENCES
    return lines if others <= 0 else [*lines[:_DIFFERENCES], f"and {others} further differences (run.json has all)"]


def configuration(out: str) -> dict[str, Any] | None:
    """Return the identity of the run in a folder, or None if there is no run.

    Raises `TableError` if `run.json` was edited: the parts are those of the earlier identity.
    """
    stored = storage.read_json(f"{out}/run.json")
    if stored is None:
        return None
    known = stored.get("configuration") if isinstance(stored, dict) else None
    if not isinstance(known, dict) or stored.get("fingerprint") != fingerprint.of(known):
        reason = f"{out}/run.json was edited: its configuration does not have its fingerprint"
        raise TableError(reason, "restore the file, or use a new folder")
    return known


def listed(out: str) -> dict[int, int]:
    """Return the committed parts of a folder: number of the part -> number of ids, the largest if a run has grown."""
    return {file.part: file.ids for file in _files(out)}


def strangers(out: str) -> list[str]:
    """Return Parquet files beside the parts that are not parts, such as renamed copies. Manifests do not list them."""
    names = (entry["name"].rpartition("/")[2] for entry in _entries(out))
    return sorted(name for name in names if name.endswith(".parquet") and not _NAME.fullmatch(name))


def survey(layout: Layout, retry_rejected: bool = False, footers: Footers | None = None) -> tuple[list[int], Totals]:
    """Return the missing parts, and the totals of the committed ones; `footers` are those known already."""
    there = {file.part: file for file in _files(layout.out)}
    present = [there[k] for k in range(layout.num_parts) if k in there and there[k].ids >= len(layout.ids(k))]
    totals, again = Totals(), set()
    for file, part in _with_footers(layout, present, footers):
        if retry_rejected and part.rejects:
            again.add(file.part)
        else:
            totals.add(part)
    return sorted((set(range(layout.num_parts)) - {file.part for file in present}) | again), totals


def write_parts(block: pa.Table, layout: Layout, publish: bool = True) -> pa.Table:
    """Commit the parts of a block with the columns id, those of the schema, and `REJECT`.

    Returns the footers with `size_bytes` as the column `part`. Without `publish` nothing is written. Raises `RunError`
    if the folder is not the run's on this node, or has another run in it by now, and `AssertionError` if the ids are
    not those of whole parts; nothing is written then.
    """
    if publish and "://" not in layout.out:
        _check_folder(layout)
    numbers = pc.divide(block["id"], layout.rows_per_part)
    parts = {k: block.filter(pc.equal(numbers, k)) for k in pc.unique(numbers).to_pylist()}
    for k, rows in parts.items():
        if rows["id"].to_pylist() != list(layout.ids(k)):
            raise AssertionError(
                f"a block with {len(rows)} of part {k}'s {len(layout.ids(k))} ids; nothing was written"
            )
    return pa.table({"part": [_write_part(k, rows, layout, publish) for k, rows in parts.items()]})


def _write_part(k: int, block: pa.Table, layout: Layout, publish: bool) -> str:
    is_good = pc.is_null(block["reject_stage"])
    names = [layout.id_column if name == "id" else name for name in block.column_names]
    rows = table.validate(block.filter(is_good).rename_columns(names), layout.schema, f"part {k}")
    part = Part(
        number=k,
        num_ids=len(block),
        labelled=len(rows),
        rejects=tuple(_rejects(block.filter(pc.invert(is_good)))),
        totals=layout.totals(rows),
        content_sha256=content_hash(rows),
        run=layout.run,
    )
    data = table.parquet_bytes(rows, {"part": part.to_json()}, layout.row_group)
    if publish:
        storage.publish(data, layout.path(k, len(block)))
    return replace(part, size_bytes=len(data)).to_json()


def reopen(layout: Layout) -> None:
    """Prepare a folder for more parts: delete `summary.json`, the completion marker, the manifest, and parts that are
    to have more ids now, so that readers never see an id twice.
    """
    fs, folder = storage.file_system(layout.out)
    with storage.access(layout.out):
        for name in ("summary.json", "manifest.parquet"):
            if fs.exists(f"{folder}/{name}"):
                fs.rm_file(f"{folder}/{name}")
        for file in _files(layout.out):
            if file.ids < len(layout.ids(file.part)):
                fs.rm_file(file.name)


def finish(layout: Layout, complete: bool = True, footers: Footers | None = None) -> None:
    """Write `rejects/rejects.parquet`, then `manifest.parquet`, from the footers of all parts.

    Raises `RunError` if a part is missing, unless `complete` is false.
    """
    there = {file.part: file for file in _files(layout.out)}
    missing = sorted(set(range(layout.num_parts)) - set(there))
    if complete and missing:
        raise RunError(
            f"{len(missing)} parts were written but are not in {layout.out}/shards (part {missing[0]} and others)",
            "--out must be storage that all nodes share, a URL or a network folder",
        )
    rejects: list[Mapping[str, str]] = []
    files: list[dict[str, Any]] = []
    present = list(there.values())
    for file, part in _with_footers(layout, present, footers):
        rejects += part.rejects
        files.append(
            {
                "path": f"shards/{layout.path(file.part, file.ids).rsplit('/', 1)[1]}",
                "rows": part.labelled,
                "rejects": len(part.rejects),
                "size_bytes": file.size_bytes,
                "content_sha256": part.content_sha256,
            }
        )
    storage.publish(table.parquet_bytes(table.from_rows(rejects, "reject.v1")), f"{layout.out}/rejects/rejects.parquet")
    if complete:
        storage.publish(table.parquet_bytes(table.from_rows(files, "shard.v1")), f"{layout.out}/manifest.parquet")


def complete(out: str, summary: Mapping[str, Any]) -> None:
    """Write `summary.json`, the last file of a run. Its existence means that the run is complete."""
    storage.publish_json(summary, f"{out}/summary.json")


def completed(out: str) -> dict[str, Any] | None:
    """Return the summary of a complete run; None if the run is not complete or does not exist."""
    summary = storage.read_json(f"{out}/summary.json")
    return None if summary is None else dict(summary)


def reject_reasons(out: str) -> Counter[str]:
    """Count the reasons of a run's rejects. Quoted names and numbers in them are replaced, so that reasons add up."""
    rows = table.read(f"{out}/rejects/rejects.parquet", "reject.v1").to_pylist()
    reasons = (f"{row['stage']}: {row['error_type']}: {row['message']}" for row in rows)
    return Counter(re.sub(r"\d+(\.\d+)?", "N", re.sub(r"'[^']*'|\"[^\"]*\"", "…", reason)) for reason in reasons)


def content_hash(rows: pa.Table) -> str:
    """Return the sha256 over the values of all rows, independent of the file format's version and compression."""
    digest = hashlib.sha256()
    for row in rows.to_pylist():
        for value in row.values():
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _check_folder(layout: Layout) -> None:
    stored = storage.read_json(f"{layout.out}/run.json")
    if stored is None:
        reason = f"{layout.out} is not the run's folder on this node"
        raise RunError(reason, "--out must be storage that all nodes share")
    if layout.run and stored["fingerprint"] != layout.run:
        reason = f"{layout.out} was moved or deleted, and another run was started there"
        raise RunError(reason, "rerun this command with the folder's new name, or with another --out")


def _with_footers(layout: Layout, files: Sequence[File], footers: Footers | None) -> Iterator[tuple[File, Part]]:
    """Yield the files with their footers; raises `RunError` for a copy of another part, or a part of another run."""
    for file, part in zip(files, (footers or Footers(layout.out)).of(files), strict=True):
        is_other = (part.number, part.num_ids) != (file.part, file.ids)
        theirs = f"part {part.number} of {part.num_ids} ids" if is_other else ""
        if layout.run and part.run not in ("", layout.run):
            theirs = "a part of another run"
        if theirs:
            path = layout.path(file.part, file.ids)
            raise RunError(f"{path} is {theirs}, copied under this name", "delete it and rerun the command")
        yield file, part


def _rejects(bad: pa.Table) -> list[dict[str, str]]:
    return [
        {
            "id": str(row["id"]),
            "stage": row["reject_stage"],
            "error_type": row["reject_type"],
            "message": row["reject_message"],
        }
        for row in bad.select(["id", *REJECT.names]).to_pylist()
    ]


def _files(out: str) -> list[File]:
    """Return all committed files in the order of parts. If a part has grown, its largest file comes last."""
    # A name that only ends like a part's ("Copy of part-...") is skipped: a manifest would list the part's own name.
    matches = [(_NAME.fullmatch(entry["name"].rpartition("/")[2]), entry) for entry in _entries(out)]
    return sorted(File(int(m[1]), int(m[2]), entry["size"], entry["name"]) for m, entry in matches if m)


def _entries(out: str) -> list[dict[str, Any]]:
    fs, path = storage.file_system(f"{out}/shards")
    fs.invalidate_cache()
    with storage.access(f"{out}/shards"):
        return list(fs.ls(path, detail=True)) if fs.exists(path) else []
