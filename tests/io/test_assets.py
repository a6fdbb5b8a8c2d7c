"""Weights and texts: found, hashed, asked for with all that a user needs to get them."""

import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from speechdistill.io import assets
from speechdistill.io.assets import Asset, Need
from speechdistill.io.errors import MissingError

FILE = Need("nsnet", "an ONNX file", "https://example.org/nsnet.onnx", "MIT")
FOLDER = Need("codec", "a model folder", "https://example.org/codec", "CC0", ("config.json", "deep/*.bin"))
ON_HUB = replace(FOLDER, hub="example/codec")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / "deep" / "a.bin").write_bytes(b"weights")
    (tmp_path / "model" / "README.md").write_text("not ours")
    return tmp_path / "model"


def test_a_file_is_hashed_and_found_again_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.onnx").write_bytes(b"abc")
    monkeypatch.chdir(tmp_path)
    found = assets.looked_up(FILE, "x.onnx")
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert found == Asset(f"{tmp_path}/x.onnx", known)
    monkeypatch.chdir("/")
    assert assets.local(FILE, found) == tmp_path / "x.onnx"


def test_a_folders_hash_is_that_of_the_files_that_count(folder: Path) -> None:
    found = assets.looked_up(FOLDER, str(folder))
    (folder / "README.md").write_text("changed")
    assert assets.looked_up(FOLDER, str(folder)) == found
    (folder / "deep" / "a.bin").rename(folder / "deep" / "b.bin")
    assert assets.looked_up(FOLDER, str(folder)).sha256 != found.sha256
    with pytest.raises(ValueError, match="has changed since the run was started"):
        assets.local(FOLDER, found)


@pytest.mark.parametrize(
    ("need", "source"), [(FILE, None), (FILE, "none.onnx"), (FOLDER, "/dev"), (FILE, "memory://no")]
)
def test_what_is_missing_is_told_with_its_source_licence_and_option(need: Need, source: str | None) -> None:
    with pytest.raises(MissingError) as caught:
        assets.looked_up(need, source)
    for part in (need.what, need.where, need.licence, f"--assets {need.name} PATH", source or ""):
        assert part in str(caught.value)


def test_the_hub_is_asked_where_nothing_is_given_and_told_where_it_is_away() -> None:
    with pytest.raises(MissingError, match=r"example/codec is not on this machine.*https://example\.org/codec"):
        assets.looked_up(ON_HUB, None)
    with pytest.raises(MissingError, match="/models/encodec does not exist"):  # and no download of somebody's model
        assets.looked_up(ON_HUB, "models/encodec")


@pytest.mark.parametrize("url", ["https://me:secret@example.org/x.onnx", "https://example.org/x.onnx?token=secret"])
def test_an_address_with_a_secret_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ValueError, match="give one without credentials") as caught:
        assets.looked_up(FILE, url)
    assert "secret" not in str(caught.value)


def test_equal_files_at_two_addresses_and_a_local_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    place = f"memory://{uuid.uuid4().hex}"
    for name in ("one.onnx", "two.onnx"):
        fsspec.filesystem("memory").pipe(f"{place}/{name}", b"abc")
        found = assets.looked_up(FILE, f"{place}/{name}")
        assert assets.local(FILE, found).read_bytes() == b"abc"
    (tmp_path / "x.onnx").write_bytes(b"abc")
    assert assets.looked_up(FILE, f"file://{tmp_path}/x.onnx") == Asset(f"{tmp_path}/x.onnx", found.sha256)


def test_somebody_elses_folder_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / f"speechdistill-assets-{os.getuid()}").mkdir()
    (tmp_path / f"speechdistill-assets-{os.getuid()}").chmod(0o777)
    fsspec.filesystem("memory").pipe("memory://x.onnx", b"abc")
    with pytest.raises(Exception, match="only this user may write"):
        assets.looked_up(FILE, "memory://x.onnx")


def test_from_a_url_it_is_fetched_once_a_node(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = f"memory://{uuid.uuid4().hex}/model"
    fsspec.filesystem("memory").put(str(folder), url, recursive=True)
    found = assets.looked_up(FOLDER, url)
    assert found == Asset(url, assets.looked_up(FOLDER, str(folder)).sha256)
    here = assets.local(FOLDER, found)
    assert (here / "deep" / "a.bin").read_bytes() == b"weights" and not (here / "README.md").exists()
    (here / "config.json").write_text("spoilt")
    assert (assets.local(FOLDER, found) / "config.json").read_text() == "{}"
    fsspec.filesystem("memory").rm(url, recursive=True)
    assert assets.local(FOLDER, found) == here
    shutil.rmtree(here)
    with pytest.raises(MissingError, match=url):
        assets.local(FOLDER, found)
