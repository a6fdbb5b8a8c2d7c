"""Outputs are tried before the work: what could not be written at the end is refused, and nothing is left behind."""

import os
import resource
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from speechdistill.io import storage
from speechdistill.io.errors import StorageError
from speechdistill.io.outputs import try_outputs


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may be larger than 100 kB: as on a full disk, making one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_an_output_that_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("older")
    try_outputs(f"{tmp_path}/old.csv", f"{tmp_path}/new/deep/x.csv", f"{tmp_path}/a::b [1]/x.csv", space_bytes=1 << 20)
    assert [file.name for file in tmp_path.iterdir()] == ["old.csv"] and (tmp_path / "old.csv").read_text() == "older"
    fsspec.filesystem("memory").mkdir("/outputs")
    try_outputs("memory://outputs/out/x.csv", "memory://outputs/out/parts/y")
    assert fsspec.filesystem("memory").find("/outputs") == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("folder", "is a folder; give the name of a file"),
        ("file/x.csv", "lies below .*/file, which is not a folder"),
        ("file/deep/x.csv", "lies below .*/file, which is not a folder"),
        ("dangling/x.csv", "lies below .*/dangling, which is not a folder"),
        ("n" * 300 + ".csv", "File name too long"),
        ("/proc/x.csv", "check the path, its permissions and the free space"),
        ("/proc/new/x.csv", "check the path, its permissions and the free space"),
        ("nothing://x/y.csv", "nothing"),
        ("http://127.0.0.1:9/x.csv", "the storage refused it"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    file = name if "://" in name else str(tmp_path / name)
    with pytest.raises(StorageError, match=reason) as error:
        try_outputs(f"{tmp_path}/good.csv", file)
    assert file in str(error.value)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write every file")
def test_a_read_only_output_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").touch(mode=0o444)
    with pytest.raises(StorageError, match="is read-only"):
        try_outputs(f"{tmp_path}/x.csv")
    tmp_path.chmod(0o555)
    with pytest.raises(StorageError, match="Permission denied"):
        try_outputs(f"{tmp_path}/y.csv")


def test_a_disk_without_space_for_the_first_part_is_told(tmp_path: Path, small_files: None) -> None:
    try_outputs(f"{tmp_path}/x.csv", space_bytes=50_000)
    with pytest.raises(StorageError, match="the free space"):
        try_outputs(f"{tmp_path}/x.csv", space_bytes=200_000)
    assert list(tmp_path.iterdir()) == []


def test_a_name_may_be_as_long_as_names_can_be(tmp_path: Path) -> None:
    name = f"{tmp_path}/{'n' * 251}.csv"
    try_outputs(name)
    storage.publish(b"x", name)
    assert Path(name).read_bytes() == b"x"
