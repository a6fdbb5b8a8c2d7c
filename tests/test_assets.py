"""Weights and texts: found, hashed, asked for with all that a user needs to get them."""

import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from speechdistill import assets
from speechdistill.assets import Asset, MissingError, Need

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
    with pytest.raises(ValueError, match="is not what the run began with"):
        assets.local(FOLDER, found)


@pytest.mark.parametrize(
    ("need", "source"), [(FILE, None), (FILE, "none.onnx"), (FOLDER, "/dev"), (FILE, "memory://no")]
)
def test_what_is_missing_is_told_with_its_source_licence_and_option(need: Need, source: str | None) -> None:
    with pytest.raises(MissingError) as caught:
        assets.looked_up(need, source)
    for part in (need.what, need.where, need.licence, f"--assets {need.name} PATH", source or ""):
        assert part in str(caught.value)


@pytest.mark.parametrize("source", [None, "somebody/other_codec", "/no/such/folder"])
def test_a_hub_id_is_asked_for_and_told_where_the_hub_is_away(source: str | None) -> None:
    with pytest.raises(
        MissingError,
        match=f"{source or 'example/codec'} is not there, and no model that the hub gives.*https://example.org/codec",
    ):
        assets.looked_up(ON_HUB, source)


def test_from_a_url_it_is_fetched_once_a_node(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    url = f"memory://{uuid.uuid4().hex}/model"
    fsspec.filesystem("memory").put(str(folder), url, recursive=True)
    found = assets.looked_up(FOLDER, url)
    assert found == Asset(url, assets.looked_up(FOLDER, str(folder)).sha256)
    fsspec.filesystem("memory").rm(url, recursive=True)
    here = assets.local(FOLDER, found)
    assert (here / "deep" / "a.bin").read_bytes() == b"weights"
    (here / "config.json").write_text("spoilt")
    with pytest.raises(ValueError, match="put the same on every node"):
        assets.local(FOLDER, found)
    shutil.rmtree(here)
    with pytest.raises(MissingError, match=url):
        assets.local(FOLDER, found)
