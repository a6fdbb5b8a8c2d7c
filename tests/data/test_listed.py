"""Lists, label files and manifests: scores, votes, splits and repeated rows mean the same to every command."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pytest
import soundfile

from manifests import voice
from speechdistill.comparing import judged
from speechdistill.data import headers, listed, listening_tests, scored_clips
from speechdistill.data.corpora import listing
from speechdistill.io import storage, table
from speechdistill.io.errors import AudioError, TableError

SPLITS = ["train"] * 4 + ["test"] * 3 + ["validation"]
SCORES = [4.5, 1.5, 4.2, 2.0, 3.0, 3.9, 3.5, 2.1]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    for i in range(8):
        soundfile.write(folder / f"c{i}.flac", voice(0.5, seed=i), 16_000)
    return folder


def listing_of(folder: Path, text: bytes | str, name: str = "list.csv") -> str:
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / name)


def ingested(source: str) -> tuple[list[dict[str, Any]], list[str], str]:
    """Clips, reasons of the rejected ones, and the line that accounts for the rows: `ingest` without Ray."""
    told: Counter[str] = Counter()
    rows = list(listed.merged(lambda: listing.rows(source), told))
    good, rejects, _ = headers.probed(rows, headers.clip)
    return good.to_pylist(), rejects["message"].to_pylist(), listed.summary(told)


def scores(source: str) -> dict[str, float | None]:
    return {Path(row["uri"]).name: row["mos"] for row in ingested(source)[0]}


def labels_csv(folder: Path, text: str, encoding: str = "utf-8") -> list[dict[str, Any]]:
    """The same text as the `labels.csv` of `--corpus csv`."""
    text = text.replace("path", "wav_path", 1).replace("mos", "score", 1)
    (folder / "labels.csv").write_bytes(text.encode(encoding))
    return listening_tests.rows("csv", str(folder))


QUOTE = """path,mos,text
c0.flac,4.0,plain
c1.flac,2.0,"Stop!" he said
c2.flac,4.2,"unclosed quote starts here
c3.flac,2.2,d
c4.flac,4.4,e
c5.flac,2.4,f
"""


def test_a_quote_that_never_closes_is_refused_with_its_line_by_every_reader(clips: Path) -> None:
    source = listing_of(clips, QUOTE)
    for reader in (ingested, judged.clips, scored_clips.manifest, scored_clips.held_out):
        with pytest.raises(TableError, match=r"list\.csv, line 4: a quote opens and never closes; close it"):
            reader(source)  # type: ignore[operator]
    with pytest.raises(TableError, match=r"labels\.csv, line 4: a quote opens and never closes"):
        labels_csv(clips, QUOTE)


@pytest.mark.parametrize(
    "spelled",
    [
        {"train": "TRAIN", "test": "TEST", "validation": "DEV"},
        {"train": "Training", "test": " eval ", "validation": "val"},
        {"train": "train", "test": "Evaluation", "validation": "valid"},
    ],
    ids=lambda spelled: spelled["train"],
)
def test_splits_of_any_usual_spelling_are_the_same_everywhere(clips: Path, spelled: dict[str, str]) -> None:
    rows = [f"c{i}.flac,{mos},d,{spelled[split]}" for i, (mos, split) in enumerate(zip(SCORES, SPLITS, strict=True))]
    text = "\n".join(["path,mos,dataset,split", *rows])
    source = listing_of(clips, text)
    assert [clip.mos for clip in judged.clips(source).clips] == SCORES[4:7]
    assert scored_clips.held_out(source)["mos"].to_pylist() == SCORES[4:7]
    train, validation = scored_clips.split(scored_clips.manifest(source))
    assert train["mos"].to_pylist() == SCORES[:4] and validation["mos"].to_pylist() == SCORES[7:]
    assert [row["split"] for row in ingested(source)[0]] == SPLITS
    assert [row["split"] for row in labels_csv(clips, text)] == SPLITS


def test_an_unknown_split_is_refused_everywhere_with_its_value(clips: Path) -> None:
    text = "path,mos,split\nc0.flac,4,train\nc1.flac,3,fold2\n"
    source, told = listing_of(clips, text), r"split 'fold2' is unknown .*line 3"
    for reader in (judged.clips, scored_clips.manifest, scored_clips.held_out):
        with pytest.raises(TableError, match=told):
            reader(source)  # type: ignore[operator]
    with pytest.raises(TableError, match=told):
        labels_csv(clips, text)
    rows, (reason,), summary = ingested(source)
    assert "c1.flac': split 'fold2' is unknown" in reason and "choose from train, validation, test" in reason
    assert summary == "2 rows = 1 files (1 with a score) + 1 rejected" and len(rows) == 1


def test_utf_16_semicolons_and_capital_names_are_read(clips: Path) -> None:
    expected = {"c0.flac": 4.0, "c1.flac": 2.0, "c2.flac": 4.2}
    text = "path,mos\r\nc0.flac,4.0\r\nc1.flac,2.0\r\nc2.flac,4.2\r\n"
    assert scores(listing_of(clips, text.encode("utf-16"))) == expected
    assert scores(listing_of(clips, text.replace(",", ";").replace(".0", ",0").replace(".2", ",2"))) == expected
    assert scores(listing_of(clips, text.replace("path,mos", "Path,MOS"))) == expected
    assert [row["mos"] for row in labels_csv(clips, text, "utf-16")] == [4.0, 2.0, 4.2]


def test_another_encoding_is_refused_with_file_line_and_remedy(clips: Path) -> None:
    source = listing_of(clips, "path,mos,speaker\nc0.flac,4.0,Jürgen\n".encode("cp1252"))
    for reader in (ingested, judged.clips, scored_clips.manifest):
        with pytest.raises(TableError, match=r"list\.csv, line 2: byte 0xfc is not UTF-8; save the list as UTF-8"):
            reader(source)  # type: ignore[operator]


@pytest.mark.parametrize("empty", ["nan", "NaN", "", " ", "NA", "null"])
def test_a_score_that_is_none_is_a_clip_without_a_score(clips: Path, empty: str, caplog: Any) -> None:
    text = f"path,mos\nc0.flac,4.0\nc1.flac,{empty}\nc2.flac,4.2\nc3.flac,2.2\nc4.flac,4.1\n"
    source = listing_of(clips, text)
    assert scores(source) == {"c0.flac": 4.0, "c1.flac": None, "c2.flac": 4.2, "c3.flac": 2.2, "c4.flac": 4.1}
    assert ingested(source)[2] == "5 rows = 5 files (4 with a score)"
    assert len(scored_clips.manifest(source)) == len(judged.clips(source).clips) == 4
    assert "5 rows = 5 files (4 with a score); 1 left out, without a score; 4 clips are used" in caplog.text
    assert [row.get("mos") for row in labels_csv(clips, text)] == [4.0, None, 4.2, 2.2, 4.1]
    assert "labels" not in caplog.text and "5 rows = 5 files (4 with a score)" in caplog.messages[-1]


@pytest.mark.parametrize("wrong", ["inf", "-inf", "0.9", "5.1", "4,5,1", "1e400", "good", "true"])
def test_a_score_that_is_no_mos_is_rejected_at_ingest_and_refused_elsewhere(clips: Path, wrong: str) -> None:
    source = listing_of(clips, f'path;mos\nc0.flac;4.0\nc1.flac;"{wrong}"\n')
    rows, (reason,), summary = ingested(source)
    assert f"c1.flac': mos '{wrong}' is not a number from 1 to 5 ({source}, line 3)" in reason and len(rows) == 1
    assert summary == "2 rows = 1 files (1 with a score) + 1 rejected"
    for reader in (judged.clips, scored_clips.manifest, scored_clips.held_out):
        with pytest.raises(TableError, match=r"1 of 2 rows cannot be used; .*c1\.flac: mos .*list\.csv, line 3"):
            reader(source)  # type: ignore[operator]


def test_a_row_of_another_length_is_rejected_at_ingest_and_refused_elsewhere(clips: Path) -> None:
    source = listing_of(clips, "path,text,mos\nc0.flac,hello, world,3,4\nc1.flac,x\nc2.flac,y,2\n")
    rows, reasons, summary = ingested(source)
    assert [row["mos"] for row in rows] == [2] and summary == "3 rows = 1 files (1 with a score) + 2 rejected"
    assert "its row has 5 fields instead of 3" in reasons[0] and "line 3" in reasons[1]
    with pytest.raises(TableError, match=r"2 of 3 rows cannot be used; .*c0\.flac: its row has 5 fields"):
        judged.clips(source)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["c0.flac,4,,", "c0.flac,2,,", "c0.flac,3,,"], (3.0, 3)),
        (["c0.flac,4,3,", "c0.flac,2,1,"], (3.5, 4)),
        (["c0.flac,4,3,", "c0.flac,2,,"], (3.5, 4)),
        (["c0.flac,4,,anna", "c0.flac,nan,,anna", "c0.flac,,,"], (4.0, 1)),
        (["c0.flac,4,,", "./c0.flac,3,,", "x/../c0.flac,2,,"], (3.0, 3)),
        (["c0.flac,,,", "c0.flac,,,"], (None, None)),
    ],
)
def test_several_rows_of_one_file_are_their_mean(clips: Path, rows: list[str], expected: Any) -> None:
    text = "\n".join(["path,mos,votes,speaker", *rows, "c1.flac,5,2,bo"])
    source = listing_of(clips, text)
    other, clip = ingested(source)[0]
    assert (clip["mos"], clip["votes"]) == expected and (other["mos"], other["votes"]) == (5, 2)
    extra = len(text.splitlines()) - 3
    assert f"= 2 files ({2 if expected[0] else 1} with a score) + {extra} further rows" in ingested(source)[2]
    wanted = [mos for mos in (5.0, expected[0]) if mos]
    assert [c.mos for c in judged.clips(source).clips] == scored_clips.manifest(source)["mos"].to_pylist() == wanted
    assert [row["mos"] for row in labels_csv(clips, text) if row.get("mos")] == wanted


def test_rows_of_one_file_that_disagree_are_rejected_at_ingest_and_refused_elsewhere(clips: Path) -> None:
    text = "path,mos,split\nc0.flac,4,train\nc1.flac,3,test\nc0.flac,4,TEST\n"
    source = listing_of(clips, text)
    told = r"its rows disagree: split is 'train' \(.*list\.csv, line 2\) and 'test' \(.*line 4\)"
    rows, (reason,), _ = ingested(source)
    assert "its rows disagree: split is 'train'" in reason and [row["mos"] for row in rows] == [3]
    for reader in (judged.clips, scored_clips.manifest, scored_clips.held_out):
        with pytest.raises(TableError, match=told):
            reader(source)  # type: ignore[operator]
    with pytest.raises(TableError, match=r"1 rows cannot be used .*its rows disagree: split"):
        labels_csv(clips, text)


def test_of_many_rows_a_second_reading_gives_the_same(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = listing_of(clips, "path,mos\nc0.flac,4\nc1.flac,2\nc0.flac,2\nc2.flac,9\n")
    expected = ingested(source)
    monkeypatch.setattr(listed, "_HELD_ROWS", 1)
    assert ingested(source) == expected and expected[2].startswith("4 rows = 2 files")


def test_one_bad_row_of_several_rejects_the_file(clips: Path) -> None:
    rows, (reason,), summary = ingested(listing_of(clips, "path,mos\nc0.flac,4\nc0.flac,9\nc1.flac,2\n"))
    assert [row["mos"] for row in rows] == [2] and "mos '9'" in reason
    assert summary == "3 rows = 1 files (1 with a score) + 1 further rows of the same files + 1 rejected"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_lists_of_other_types_follow_the_same_rules(clips: Path, suffix: str) -> None:
    frame = pandas.DataFrame(
        {
            "Path": [f"c{i}.flac" for i in range(5)],
            "mos": [4.0, float("nan"), float("inf"), 3.0, 5.0],
            "split": pandas.Categorical(["TRAIN", "dev", None, "Test", "TEST"]),
            "speaker": ["a", float("nan"), None, "b", " "],
        }
    )
    file = clips / f"list.{suffix}"
    if suffix == "jsonl":
        file.write_text("\ufeff" + "\n".join(json.dumps(row) for row in frame.to_dict("records")))
    else:
        frame.to_parquet(file)
    rows, (reason,), summary = ingested(str(file))
    assert [(row["mos"], row["split"], row["speaker"]) for row in rows] == [
        (4.0, "train", "a"),
        (None, "validation", None),
        (3.0, "test", "b"),
        (5.0, "test", None),
    ]
    assert "mos inf is not a number from 1 to 5" in reason and summary.endswith("files (3 with a score) + 1 rejected")
    with pytest.raises(TableError, match="mos inf"):
        judged.clips(str(file))
    frame = frame[frame.mos != float("inf")]
    file.write_text("\n".join(map(json.dumps, frame.to_dict("records")))) if suffix == "jsonl" else frame.to_parquet(
        file
    )
    assert [clip.mos for clip in judged.clips(str(file)).clips] == [3.0, 5.0]


def test_a_list_without_a_path_in_a_row_is_refused_with_its_line(clips: Path) -> None:
    with pytest.raises(TableError, match=r"list\.csv, line 3 has no path; fill in path or uri"):
        ingested(listing_of(clips, "path,mos\nc0.flac,4\n,3\n"))
    with pytest.raises(TableError, match=r"labels\.csv, line 3 has no path"):
        labels_csv(clips, "path,mos\nc0.flac,4\n,3\n")


def stored(file: Path, mos: list[float | None], splits: list[str | None]) -> str:
    rows = [
        {"clip_id": f"{i:016x}", "uri": f"/{i}.wav", "kind": "speech", "duration_s": 1.0, "sample_rate": 16_000}
        | {"channels": 1, "mos": pair[0], "split": pair[1]}
        for i, pair in enumerate(zip(mos, splits, strict=True))
    ]
    storage.publish(table.parquet_bytes(table.from_rows(rows, "clip.v1")), str(file))
    return str(file)


def test_a_stored_manifest_with_nan_and_capital_splits_does_not_block(tmp_path: Path, caplog: Any) -> None:
    mos = [4.0, float("nan"), 3.0, 2.0, None]
    source = stored(tmp_path / "clips.parquet", mos, ["TRAIN", "Train", "TEST", "dev", None])
    assert scored_clips.held_out(source)["mos"].to_pylist() == [3.0]
    told = "5 rows = 5 files (3 with a score); 2 left out, without a score; 1 left out, of split train"
    assert f"clips.parquet: {told}" in caplog.text
    clips = scored_clips.manifest(source)
    assert clips["split"].to_pylist() == ["train", "test", "validation"] and clips["mos"].to_pylist() == [4, 3, 2]
    assert clips.schema.equals(table.schema("clip.v1"))
    raw = table.read(source, "clip.v1")  # what a worker may read
    assert [len(part) for part in scored_clips.split(raw.filter(pa.array([True, False, True, True, False])))] == [1, 1]
    with pytest.raises(TableError, match=r"clips\.parquet: split 'fold1' is unknown"):
        scored_clips.manifest(stored(tmp_path / "clips.parquet", [3.0], ["fold1"]))
    with pytest.raises(TableError, match=r"/0\.wav has mos inf"):
        scored_clips.held_out(stored(tmp_path / "clips.parquet", [float("inf")], [None]))


def test_a_manifest_that_has_a_clip_twice_has_it_once(tmp_path: Path, caplog: Any) -> None:
    tables = [
        table.read(stored(tmp_path / f"{i}.parquet", [4.0, 2.0], [None, s]), "clip.v1") for i, s in enumerate("ab")
    ]
    column = pa.array([None, "train", None, "Train"])
    both = pa.concat_tables(tables).set_column(5, "split", column)
    storage.publish(table.parquet_bytes(both), f"{tmp_path}/clips.parquet")
    assert scored_clips.held_out(f"{tmp_path}/clips.parquet")["mos"].to_pylist() == [4.0]
    assert "4 rows = 2 files (2 with a score) + 2 further rows of the same files; 1 left out, of split" in caplog.text
    storage.publish(
        table.parquet_bytes(both.set_column(6, "speaker", pa.array(["x", "y", "z", None]))), f"{tmp_path}/clips.parquet"
    )
    with pytest.raises(TableError, match=r"1 of 4 rows cannot be used; .*its rows disagree: speaker is 'x'"):
        scored_clips.manifest(f"{tmp_path}/clips.parquet")


def test_every_row_of_a_list_is_accounted_for_in_one_line(clips: Path, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    lines = [
        "c0.flac,4,,train",
        "c1.flac,,,test",
        "c2.flac,3,,test",
        "c2.flac,4,,test",
        "c3.flac,,noise,",
        "c4.flac,2,,val",
    ]
    text = "\n".join(["path,mos,kind,split", *lines])
    source = listing_of(clips, text)
    scored_clips.held_out(source)
    assert caplog.messages == [
        f"{source}: 6 rows = 5 files (3 with a score) + 1 further rows of the same files; 1 left out, no speech; "
        "1 left out, without a score; 1 left out, of split train; 1 left out, of split validation; 1 clips are used"
    ]
    caplog.clear()
    scored_clips.manifest(source)
    assert caplog.messages[0].endswith("without a score; 1 left out, of split test; 2 clips are used")
    scored_clips.manifest(listing_of(clips, "path,mos\nc0.flac,4\n"))
    assert caplog.records[-1].levelno == logging.INFO and "1 rows = 1 files" in caplog.messages[-1]


def test_rules_of_values() -> None:
    assert [listed.score(value) for value in (4, "4,5", " 4.5 ", "1", None, float("nan"))] == [
        4,
        4.5,
        4.5,
        1,
        None,
        None,
    ]
    for wrong in (True, [3], "1.234,5", 0, 6, "five"):
        with pytest.raises(TableError, match="is not a number from 1 to 5"):
            listed.score(wrong)
    assert listed.normalised({"votes": "8.0"}) == {"votes": 8} and listed.normalised({"votes": ""}) == {"votes": None}
    assert listed.normalised({"kind": " Noise"}) == {"kind": "noise"}
    with pytest.raises(TableError, match="kind 'music' is unknown; choose from speech, noise, rir"):
        listed.normalised({"kind": "music"})
    for wrong in ("2.5", "-1", "inf", "many", 2**31):
        with pytest.raises(TableError, match="is not a count"):
            listed.normalised({"votes": wrong})


def test_faults_are_errors_that_travel(clips: Path) -> None:
    import pickle

    (row,) = listing.rows(listing_of(clips, "path,mos\nc0.flac,9\n"))
    error = pickle.loads(pickle.dumps(row["error"]))
    assert isinstance(error, AudioError) and error.path == row["uri"]


@pytest.mark.parametrize("later", [["a", "b"], ["a", "b", "c", "d"], ["a", "c", "b"]])
def test_a_list_that_changes_between_its_two_readings_is_refused(
    later: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listed, "_HELD_ROWS", 1)
    answers = iter([["a", "b", "c"], later])
    rows = listed.merged(lambda: [{"uri": f"/{name}.wav", "kind": "speech"} for name in next(answers)])
    with pytest.raises(TableError, match=r"a list changed while it was read, at row \d of 3; rerun the command"):
        list(rows)
