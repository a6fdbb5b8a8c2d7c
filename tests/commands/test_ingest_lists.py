"""Ingest of a file that lists, corpora and folders give at once: one clip, with all that they know of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import soundfile

from manifests import voice
from speechdistill.commands import ingest
from speechdistill.commands.ingest import Ingest
from speechdistill.engine import cluster
from speechdistill.io import table


@pytest.fixture
def speech(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of four clips, beside an empty folder for lists; without a Ray."""
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "in_order", map)
    for i in range(4):
        (tmp_path / "speech" / f"p{i}").mkdir(parents=True)
        soundfile.write(tmp_path / "speech" / f"p{i}" / "c.flac", voice(1, seed=i), 16_000)
    (tmp_path / "lists").mkdir()
    return tmp_path / "speech"


def listing_of(speech: Path, *rows: str, name: str = "l.csv") -> str:
    file = speech.parent / "lists" / name
    file.write_text("\n".join(rows))
    return str(file)


def ingested(folder: Path, **options: Any) -> dict[str, dict[str, Any]]:
    """The clips by their folders' names; the manifest of the test grows."""
    ingest.run(Ingest(out=f"{folder.parent}/m", **options))
    rows = table.read(f"{folder.parent}/m/clips.parquet", "clip.v1").to_pylist()
    found = {Path(row["uri"]).parent.name: row for row in rows}
    assert len(found) == len(rows), "a file is two clips"
    return found


LABELS = ("path,mos,speaker,corpus", "../speech/p0/c.flac,4,anna,mine", "../speech/p1/c.flac,2,,")


@pytest.mark.parametrize("rule", [None, "parent"])
def test_the_labels_of_a_list_win_over_what_a_folder_says(speech: Path, rule: str | None) -> None:
    clips = ingested(speech, speech=(str(speech),), list=(listing_of(speech, *LABELS),), speaker_from=rule)
    assert [clips[f"p{i}"]["mos"] for i in range(4)] == [4, 2, None, None]
    assert [clips[f"p{i}"]["corpus"] for i in range(4)] == ["mine", "speech", "speech", "speech"]
    assert [clips[f"p{i}"]["speaker"] for i in range(4)] == ["anna", *([f"p{i}" if rule else None for i in (1, 2, 3)])]


def test_a_second_run_with_both_changes_nothing(speech: Path) -> None:
    options: dict[str, Any] = {"speech": (str(speech),), "list": (listing_of(speech, *LABELS),)}
    first = ingested(speech, **options, speaker_from="parent")
    assert ingested(speech, **options, speaker_from="parent") == first
    assert json.loads((speech.parent / "m/ingest.json").read_text())["changes"] == {}


def test_a_row_of_another_kind_or_folder_is_not_filled(speech: Path) -> None:
    other = shutil.copytree(speech, speech.parent / "other")
    source = listing_of(speech, "path,kind", "../speech/p0/c.flac,noise", f"{other}/p1/c.flac,speech")
    ingest.run(Ingest(out=f"{speech.parent}/m", speech=(str(speech),), list=(source,)))
    rows = table.read(f"{speech.parent}/m/clips.parquet", "clip.v1").to_pylist()
    assert [(row["kind"], row["corpus"]) for row in rows[:2]] == [("noise", None), ("speech", None)] and len(rows) == 6


def test_a_corpus_and_lists_are_read_as_one_list(speech: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (speech / "labels.csv").write_text("wav_path,score,votes\np0/c.flac,4,3\np1/c.flac,2,1\n")
    one = listing_of(speech, "path,mos,votes,speaker", "../speech/p0/c.flac,2,1,anna", "../speech/p1/c.flac,,,bo")
    two = listing_of(speech, "path,mos", f"{speech}/p2/c.flac,5", name="l2.csv")
    for lists in ((one, two), (two, one)):
        clips = ingested(speech, corpus="csv", root=str(speech), list=lists)
        assert [(clips[f"p{i}"]["mos"], clips[f"p{i}"]["votes"]) for i in range(2)] == [(3.5, 4), (2, 1)]
        assert [clips[f"p{i}"]["speaker"] for i in range(2)] == ["anna", "bo"] and clips["p2"]["mos"] == 5


def test_a_corpus_and_a_list_that_disagree_are_told(speech: Path) -> None:
    (speech / "labels.csv").write_text("wav_path,score,split\np0/c.flac,4,train\np1/c.flac,2,train\n")
    source = listing_of(speech, "path,split", "../speech/p0/c.flac,test")
    clips = ingested(speech, corpus="csv", root=str(speech), list=(source,))
    (reject,) = table.read(f"{speech.parent}/m/rejects.parquet", "reject.v1").to_pylist()
    assert list(clips) == ["p1"] and "split is 'train' (--corpus csv) and 'test' (" in reject["message"]


@pytest.mark.parametrize("given", [lambda path: f"{path}/", lambda path: f"{path.parent}/./speech", str])
def test_a_folder_is_named_alike_by_its_walk_and_for_lists(speech: Path, given: Callable[[Path], str]) -> None:
    clips = ingested(speech, speech=(given(speech),), list=(listing_of(speech, *LABELS),))
    assert {row["corpus"] for name, row in clips.items() if name != "p0"} == {"speech"}


def test_the_current_folder_has_its_own_name(speech: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(speech)
    assert {row["corpus"] for row in ingested(speech, speech=(".",)).values()} == {"speech"}
