"""Schemas, validation and atomic files."""

import json
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speechdistill.io import fingerprint, storage, table
from speechdistill.io.errors import StorageError, TableError

PUBLISHED = {
    "clip.v1": "668f30678767a196",
    "pseudolabel.v1": "7e738d1ad378d0e6",
    "reject.v1": "3474e4b9327ac5d1",
    "shard.v1": "67e5a43a16a91176",
}
REJECT = {"id": "1", "stage": "degrade", "error_type": "ValueError", "message": "no"}


@pytest.mark.parametrize(("name", "digest"), PUBLISHED.items())
def test_published_schemas_are_never_edited(name: str, digest: str) -> None:
    choices = table.choices(name)
    fields = [(f.name, str(f.type), f.nullable, choices.get(f.name)) for f in table.schema(name)]
    assert fingerprint.of(fields)[:16] == digest, "publish a new version instead"
    for field in table.schema(name):
        assert field.metadata[b"description"], field


def test_rows_round_trip(tmp_path: Path) -> None:
    path = f"{tmp_path}/r.parquet"
    storage.publish(table.parquet_bytes(table.from_rows([REJECT], "reject.v1")), path)
    assert table.read(path, "reject.v1").to_pylist() == [REJECT]


@pytest.mark.parametrize(
    ("rows", "name", "message"),
    [
        ([{**REJECT, "colour": "red"}], "reject.v1", r"unknown columns \['colour'\]"),
        ([{**REJECT, "id": 3.5}], "reject.v1", r"reject\.v1\.id"),
        ([{**REJECT, "id": None}], "reject.v1", r"reject\.v1\.id is null in 1 rows"),
        ([], "clip.v9", r"schema 'clip\.v9' is unknown; choose from .*clip\.v1"),
    ],
)
def test_bad_rows_are_refused_by_name(rows: list[dict], name: str, message: str) -> None:
    with pytest.raises(TableError, match=message):
        table.from_rows(rows, name)


def test_choices_are_checked_and_listed() -> None:
    clip = {
        "clip_id": "0",
        "uri": "/a",
        "kind": "music",
        "duration_s": 1.0,
        "sample_rate": 8000,
        "channels": 1,
    }
    with pytest.raises(TableError, match=r"kind is \['music'\]; choose from \['speech', 'noise', 'rir'\]"):
        table.from_rows([clip], "clip.v1")


def test_files_that_are_no_tables_say_so(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such file"):
        table.read(f"{tmp_path}/none.parquet", "clip.v1")
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(TableError, match="not a Parquet file"):
        table.read(f"{tmp_path}/text.parquet", "clip.v1")
    pq.write_table(pa.table({"uri": ["/a"]}), tmp_path / "other.parquet")
    with pytest.raises(TableError, match=r"columns \['clip_id', 'kind', .*are missing"):
        table.read(f"{tmp_path}/other.parquet", "clip.v1")


def test_readers_see_whole_files_only(tmp_path: Path) -> None:
    path, stop, seen = f"{tmp_path}/f.json", threading.Event(), set()
    storage.publish_json({"n": 0, "pad": "0" * 100_000}, path)

    def read() -> None:
        while not stop.is_set():
            seen.add(len(json.loads(Path(path).read_text())["pad"]))

    reader = threading.Thread(target=read)
    reader.start()
    for n in range(50):
        storage.publish_json({"n": n, "pad": "0" * 100_000}, path)
    stop.set()
    reader.join()
    assert seen == {100_000}
    assert [p.name for p in tmp_path.iterdir()] == ["f.json"], "a temporary file was left"


def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path: Path) -> None:
    path = f"{tmp_path}/r.parquet"
    storage.publish(b"old", path)

    def broken():  # type: ignore[no-untyped-def]
        yield table.from_rows([REJECT], "reject.v1")
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError):
        table.publish_stream(broken(), "reject.v1", path)
    assert Path(path).read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_urls_work_like_paths() -> None:
    storage.publish_json({"a": 1}, "memory://folder/x.json")
    assert storage.read_json("memory://folder/x.json") == {"a": 1}
    assert storage.read_json("memory://folder/y.json") is None


def test_differences_name_the_path() -> None:
    old, new = {"recipe": {"seed": 1, "name": "a"}, "x": 1}, {"recipe": {"seed": 2, "name": "a"}, "y": 1}
    assert fingerprint.differences(old, new) == ["recipe.seed: 1 -> 2", "x: 1 -> null", "y: null -> 1"]
    assert fingerprint.differences({"runs": [{"a": 1}, {"a": 2}]}, {"runs": [{"a": 1}, {"a": 3}]}) == [
        "runs.1.a: 2 -> 3"
    ]
    (line,) = fingerprint.differences({"x": ["y" * 2_000]}, {"x": []})
    assert len(line) < 150, "a long value is cut"


def test_a_place_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("{")
    with pytest.raises(StorageError, match=rf"{tmp_path}/file/a: FileExistsError: .*; check the path"):
        storage.publish(b"", f"{tmp_path}/file/a")
    with pytest.raises(StorageError, match=rf"{tmp_path}/none: FileNotFoundError: .*; check the path"):
        fingerprint.of_file(f"{tmp_path}/none")
    with pytest.raises(StorageError, match=r"nosuch://bucket: .*Protocol not known.*; check the address"):
        storage.file_system("nosuch://bucket")
    with pytest.raises(TableError, match=r"file: not JSON .*; it may have been edited"):
        storage.read_json(f"{tmp_path}/file")
