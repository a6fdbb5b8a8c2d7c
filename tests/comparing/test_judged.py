"""Clips that models are judged on: files of any name are hashed, read, and found again among the scores."""

import csv
import hashlib
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

from comparisons import compared
from manifests import row, voice
from mlflow_runs import student
from speechdistill.comparing import judged, scoring
from speechdistill.data import scored_clips
from speechdistill.data.corpora import webdataset
from speechdistill.io import audio, audio_files, storage, table
from speechdistill.io.errors import AudioError, TableError
from speechdistill.io.places import Skipped

NAMES = [
    "a::b.flac",
    "x.parquet#1.flac",
    "x.parquet#1.2.flac",
    "100%.flac",
    "take[1]?*.flac",
    "new\nline.flac",
    " b.flac ",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "odd::[1]"
    root.mkdir()
    for number, name in enumerate(NAMES):
        soundfile.write(root / name, voice(0.5, seed=number), 16_000, format="FLAC")
    return root


def test_clips_of_any_name_are_hashed_and_read(folder: Path) -> None:
    with (folder.parent / "list.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "mos"], *([f"{folder.name}/{name}", "3"] for name in NAMES)])
    clips = judged.clips(str(folder.parent / "list.csv")).clips
    assert [clip.uri for clip in clips] == [f"{folder}/{name}" for name in NAMES]
    for clip in clips:
        assert clip.sha256 == hashlib.sha256(Path(clip.uri).read_bytes()).hexdigest()
        np.testing.assert_array_equal(judged.read(clip.uri), soundfile.read(clip.uri, dtype="float32")[0])


def test_clips_of_any_name_from_a_list_of_any_name_are_compared(folder: Path) -> None:
    names = [f"{folder}/{name}" for name in NAMES]
    with (folder / "x::y.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "mos"], *([name, f"{1 + i / 2}"] for i, name in enumerate(names))])
    found = compared(f"{folder}/x::y.csv", student(folder.parent / "student", 0), folder.parent)
    assert [clip.uri for clip in found.clips] == names and not found.left_out
    assert all(np.isfinite(scores).all() for scores in found.scores.values())


def test_members_of_a_tar_are_hashed_and_read(folder: Path) -> None:
    with tarfile.open(folder / "s.tar", "w") as tar:
        tar.add(folder / NAMES[0], "a.b::c.flac")
    (row,) = webdataset.rows([{"uri": f"{folder}/s.tar", "kind": "speech"}], Skipped(), set())
    rows = [{**row, "clip_id": "0" * 16, "mos": 3.0, "duration_s": 0.5, "sample_rate": 16_000, "channels": 1}]
    storage.publish(table.parquet_bytes(table.from_rows(rows, "clip.v1")), f"{folder}/clips.parquet")
    (clip,) = judged.clips(f"{folder}/clips.parquet").clips
    assert clip.sha256 == hashlib.sha256((folder / NAMES[0]).read_bytes()).hexdigest()
    np.testing.assert_array_equal(judged.read(clip.uri), audio.load(f"{folder}/{NAMES[0]}"))


def test_a_clip_that_changes_between_hashing_and_decoding_has_no_score_under_its_old_hash(folder: Path) -> None:
    file = folder / NAMES[0]
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    np.testing.assert_array_equal(judged.read_if_same(str(file), before), judged.read(str(file)))
    soundfile.write(file, voice(0.5, seed=99), 16_000, format="FLAC")
    with pytest.raises(AudioError, match="has changed since it was hashed"):
        judged.read_if_same(str(file), before)
    (answer,) = scoring.Decode([scoring.Task(before, str(file), ("model",))])([{"id": 0}])
    assert isinstance(answer, AudioError)


def test_a_manifests_clip_that_has_changed_since_is_not_judged_by_its_old_score(folder: Path) -> None:
    rows = []
    for name in NAMES[:2]:
        size, etag = audio_files.version(f"{folder}/{name}")
        rows.append(row(f"{folder}/{name}", duration_s=0.5, mos=3.0, size_bytes=size, etag=etag))
    source = f"{folder}/clips.parquet"
    storage.publish(table.parquet_bytes(table.from_rows(rows, "clip.v1")), source)
    assert len(judged.clips(source).clips) == len(scored_clips.manifest(source)) == 2
    soundfile.write(folder / NAMES[1], voice(0.5, seed=99), 16_000, format="FLAC")
    for read in (judged.clips, scored_clips.manifest):
        with pytest.raises(TableError, match=r"1 of its 2 clips have changed since .*x\.parquet#1\.flac first; rerun"):
            read(source)
    (folder / NAMES[1]).unlink()
    assert len(judged.clips(source).clips) == 2, "a file that is gone is rejected alone, with its reason"


def test_scores_are_found_again_in_a_folder_of_any_name(folder: Path) -> None:
    answer = '{"model": {"score": 3.0, "error": null, "cpu_s": null}}'
    rows = [{"number": 0, "clip_sha256": "ab", "uri": "/a.wav", "duration_s": 1.0, "scores": answer}]
    part = f"{folder}/scores/x/shards/part-00000000-00000001.parquet"
    storage.publish(table.parquet_bytes(table.from_rows(rows, scoring.SCHEMA)), part)
    assert scoring.committed(str(folder)) == {("model", "ab"): scoring.Score(3.0, None, 1.0, None)}
