"""Rows of lists: one address for a file, and labels as their writer meant them."""

from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from manifests import voice
from speechdistill.comparing import judged
from speechdistill.data import listening_tests, scored_clips
from speechdistill.data.corpora import listing
from speechdistill.io.errors import TableError


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for i in range(4):
        soundfile.write(folder / f"c{i}.flac", voice(0.5, seed=i), 16_000)
    return folder


def listing_of(folder: Path, text: str, name: str = "list.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_file_has_one_address_however_its_path_is_written(clips: Path, tmp_path: Path) -> None:
    """Else a list and a folder, or two lists, give a file twice: once to train on and once to test on."""
    (tmp_path / "link").symlink_to(clips)
    (clips / "lists").mkdir(exist_ok=True)
    spelled = ["../c0.flac", f"{clips}/./c1.flac", f"file://{clips}/c2.flac", f"{tmp_path}/link/c3.flac"]
    source = listing_of(clips / "lists", "\n".join(["path,mos", *(f"{path},3" for path in spelled)]))
    assert [row["uri"] for row in listing.rows(source)] == [f"{clips}/c{i}.flac" for i in range(4)]
    listing_of(clips, "\n".join(["wav_path,score", *(f"{path},3" for path in ["c0.flac", *spelled[1:]])]), "labels.csv")
    assert [row["uri"] for row in listening_tests.rows("csv", str(clips))] == [f"{clips}/c{i}.flac" for i in range(4)]


def test_the_name_of_a_file_that_is_a_link_stays(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "data").write_bytes((clips / "c0.flac").read_bytes())
    (tmp_path / "a.flac").symlink_to(tmp_path / "data")
    assert [row["uri"] for row in listing.rows(listing_of(tmp_path, "path\na.flac\n"))] == [f"{tmp_path}/a.flac"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_numbers_of_speakers_are_the_same_in_every_list(clips: Path, suffix: str) -> None:
    """pandas makes a column with a missing whole number one of floats: pandas-dev/pandas#8596."""
    frame = pandas.DataFrame({"path": ["c0.flac", "c1.flac"], "speaker": [17, None], "system": [1.5, 2.0]})
    file = clips / f"list.{suffix}"
    frame.to_json(file, orient="records", lines=True) if suffix == "jsonl" else frame.to_parquet(file)
    assert [(row.get("speaker"), row["system"]) for row in listing.rows(str(file))] == [("17", "1.5"), (None, "2")]


def test_words_that_other_readers_take_for_none_are_names(clips: Path) -> None:
    """huggingface/datasets#4467; and zeros in front of a number: fastai/fastai#1008."""
    source = listing_of(clips, "path,mos,speaker,system\nc0.flac,4,null,NA\nc1.flac,3,None,007\n")
    named = [(row["speaker"], row["system"]) for row in listing.rows(source)]
    assert named == [("null", "NA"), ("None", "007")]


def test_bytes_that_are_no_text_are_told_with_their_row(clips: Path) -> None:
    columns = {"path": [b"c0.flac", b"c1.flac"], "speaker": [b"anna", b"bo\xff"]}
    pq.write_table(pa.table(columns), clips / "list.parquet")
    good, bad = listing.rows(f"{clips}/list.parquet")
    assert good["speaker"] == "anna"
    assert "c1.flac': its row has a speaker that is not UTF-8" in str(bad["error"]) and "line 2" in str(bad["error"])
    pq.write_table(pa.table({"path": [b"c\xe9.flac"]}), clips / "list.parquet")
    with pytest.raises(TableError, match=r"list\.parquet, row 1: path b'c\\xe9\.flac' is not UTF-8"):
        list(listing.rows(f"{clips}/list.parquet"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "x.txt",
            r"x\.txt(: a list of another type| is neither a list of scored clips nor the folder .*); give .*\.csv, ",
        ),
        ("x.txt/sub.csv", r"sub\.csv: no such list"),
        ("x.txt/sub", r"sub: no such file; check the path"),
        ("nothing", r"nothing: no such file; check the path"),
        ("folder", r"folder is a folder; run `speechdistill ingest"),
    ],
)
def test_what_is_no_list_is_told_with_what_to_give(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "x.txt").write_text("path,mos\na.wav,3\n")
    (tmp_path / "folder").mkdir()
    for reader in (judged.clips, scored_clips.held_out, scored_clips.manifest):  # compare, promote, training
        with pytest.raises(TableError, match=message):
            reader(f"{tmp_path}/{name}")  # type: ignore[operator]
