"""Scored corpora: miniature trees in their real layouts, and everything that may be wrong with them."""

import logging
import sys
from collections import Counter
from pathlib import Path
from typing import get_args
from zipfile import ZipFile

import fsspec
import numpy as np
import openpyxl
import pytest
import soundfile

from speechdistill.commands import ingest
from speechdistill.commands.ingest import Ingest
from speechdistill.data import corpus, listening_tests
from speechdistill.io import table
from speechdistill.io.errors import LibraryError, RunError, TableError


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")


def write(file: Path, *lines: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(lines) + "\n")


def splits(rows: list[dict]) -> dict[str, int]:
    return dict(Counter(row["split"] for row in rows))


def test_every_name_is_a_choice_with_rows_of_its_own() -> None:
    names = sorted(listening_tests.READERS)
    assert sorted(get_args(listening_tests.CorpusName)) == names and len(names) == 22
    with pytest.raises(TableError, match=r"corpus 'nisqua' is unknown; choose from .*nisqa_sim"):
        listening_tests.rows("nisqua", "/nowhere")


def test_the_counts_of_the_paper_add_up() -> None:
    counts = np.array([reader.paper or (0, 0, 0) for reader in listening_tests.READERS.values()])
    assert counts.sum(0).tolist() == [108_519, 8_525, 46_060]  # of its table's cells


@pytest.fixture
def nisqa(tmp_path: Path) -> Path:
    columns = (
        "db,con,file,con_description,filename_deg,filename_ref,source,lang,votes,mos,noi,filepath_deg,filepath_ref"
    )
    lines = []
    for db in ("TRAIN_SIM", "VAL_SIM", "TRAIN_LIVE", "VAL_LIVE", "TEST_FOR", "TEST_LIVETALK", "TEST_P501"):
        for number in range(2):
            path = f"NISQA_{db}/deg/c0{number}.wav"
            touch(tmp_path, path)
            lines.append(
                f"NISQA_{db},{number + 1},7,x,c0{number}.wav,ref.wav,s,de,5,{2 + number}.5,3,{path},ref/ref.wav"
            )
    write(tmp_path / "NISQA_corpus_file.csv", columns, *lines)
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nisqa_sim", {"train": 2, "validation": 2}),
        ("nisqa_live", {"train": 2, "validation": 2}),
        ("nisqa_for", {"test": 2}),
        ("nisqa_livetalk", {"test": 2}),
        ("nisqa_p501", {"test": 2}),
    ],
)
def test_nisqa_takes_the_databases_of_its_name(nisqa: Path, name: str, expected: dict[str, int]) -> None:
    rows = listening_tests.rows(name, str(nisqa))
    assert splits(rows) == expected
    first = rows[0]
    assert first["uri"].startswith(str(nisqa / "NISQA_")) and first["uri"].endswith("/deg/c00.wav")
    assert (first["mos"], first["votes"], first["language"], first["input_id"]) == (2.5, 5, "de", "ref.wav")
    assert first["system"].startswith("NISQA_") and first["dataset"] == name and first["kind"] == "speech"


def test_pstn_sets_a_custom_validation_split_aside_that_no_order_changes(tmp_path: Path) -> None:
    names = [f"{number:04d}_x.wav" for number in range(40)]
    touch(tmp_path / "pstn_train", *names)
    listed = [f"{name},3.5,0.9,0.4,5" for name in names]
    write(tmp_path / "pstn_train" / "pstn_train.csv", "filename,MOS,std,95%CI,votes", *listed)
    rows = listening_tests.rows("pstn", str(tmp_path))
    assert splits(rows) == {"train": 36, "validation": 4} and rows[0]["votes"] == 5
    chosen = {row["uri"] for row in rows if row["split"] == "validation"}
    write(tmp_path / "pstn_train" / "pstn_train.csv", "filename,MOS,std,95%CI,votes", *reversed(listed))
    assert chosen == {row["uri"] for row in listening_tests.rows("pstn", str(tmp_path)) if row["split"] == "validation"}
    touch(tmp_path, "test/a.wav")
    write(tmp_path / "test.csv", "deg_wav,mos", "test/a.wav,1.5")
    assert splits(listening_tests.rows("pstn", str(tmp_path))) == {"train": 36, "validation": 4, "test": 1}


def test_a_large_corpus_validates_on_1000_clips() -> None:
    rows = corpus.with_validation({"uri": f"/c/{number}.wav"} for number in range(20_000))
    assert splits(rows) == {"train": 19_000, "validation": 1_000}


@pytest.mark.parametrize("suffix", ["", "MOS"])
def test_tencent_has_two_lists_and_folders_with_or_without_mos(tmp_path: Path, suffix: str) -> None:
    for part in ("withReverberationTrainDev", "withoutReverberationTrainDev"):
        names = [f"{number:04d}.wav" for number in range(10)]
        touch(tmp_path / f"{part}{suffix}", *names)
        write(tmp_path / f"{part}MOS.csv", "deg_wav,mos", *(f"./{part}MOS/{name},1.25" for name in names))
    rows = listening_tests.rows("tencent", str(tmp_path))
    assert splits(rows) == {"train": 18, "validation": 2}
    assert rows[0]["uri"] == str(tmp_path / f"withReverberationTrainDev{suffix}" / "0000.wav")
    assert (rows[0]["mos"], rows[0]["language"]) == (1.25, "zh")


def test_tub_is_for_tests_only(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav")
    write(tmp_path / "test.csv", "deg_wav,mos", "a.wav,4.25")
    assert splits(listening_tests.rows("tub", str(tmp_path))) == {"test": 1}
    with pytest.raises(TableError, match=r"nowhere/test.csv is missing; give the folder of .* with --root"):
        listening_tests.rows("tub", str(tmp_path / "nowhere"))


def test_voicemos_trains_on_the_chinese_clips_that_were_labelled_later(tmp_path: Path) -> None:
    for track in ("main", "ood"):
        for name in ("train", "val", "test", "unlabeled"):
            wav = f"sys{track}-utt{name}.wav"
            touch(tmp_path / track / "DATA" / "wav", wav)
            file = f"{name}_mos_list{'_LABELS' if name == 'unlabeled' else ''}.txt"
            write(tmp_path / track / "DATA" / "sets" / file, f"{wav},3.125")
    write(tmp_path / "ood" / "DATA" / "sets" / "unlabeled_mos_list.txt", "sysood-uttunlabeled.wav")
    english = listening_tests.rows("voicemos2022_en", str(tmp_path / "main"))
    assert splits(english) == {"train": 1, "validation": 1, "test": 1}
    chinese = listening_tests.rows("voicemos2022_cn", str(tmp_path / "ood"))
    assert splits(chinese) == {"train": 2, "validation": 1, "test": 1}
    assert {(row["system"], row["language"]) for row in chinese} == {("sysood", "zh")}


@pytest.mark.parametrize("folder", ["", "wavs/"])
def test_blizzard_tells_its_tasks_apart(tmp_path: Path, folder: str) -> None:
    names = ["VoiceMOS2023Track1-A-AD_test_0026", "VoiceMOS2023Track1-A-NEB_test_0001", "VoiceMOS2023Track1-B-NEB_t_1"]
    touch(tmp_path, *(f"{folder}{name}.wav" for name in names))
    write(tmp_path / "answer.csv", *(f"{name},4.42105263157895" for name in names))
    assert [row["system"] for row in listening_tests.rows("blizzard2023_tts", str(tmp_path))] == ["A-NEB", "B-NEB"]
    (adapted,) = listening_tests.rows("blizzard2023_sa", str(tmp_path))
    assert (adapted["system"], adapted["split"], adapted["language"]) == ("A-AD", "test", "fr")


def spreadsheet(file: Path, *sheets: list[list[str | float]]) -> None:
    book = openpyxl.Workbook()
    book.remove(book.active)
    for rows in sheets:
        sheet = book.create_sheet()
        for row in rows:
            sheet.append(row)
    book.save(file)


def test_tcd_voip_is_read_from_its_spreadsheet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sheet = tmp_path / "TCD VOIP - Test Set Conditions and MOS Results.xlsx"
    folder = "Test Set/chop"
    touch(tmp_path, f"{folder}/C_01_CHOP_FA.wav", f"{folder}/ref/R_01_CHOP_FA.wav", "Test Set/echo/C_20_ECHO_ML.wav")
    spreadsheet(tmp_path / "A list of conditions.xlsx", [["Condition", "what it is"]])
    header: list[str | float] = ["Filename", "ConditionID", "sample MOS", 1]
    lines = [header, ["C_01_CHOP_FA.wav", 1, 4.541666667, 5], ["C_20_ECHO_ML.wav", 20, 1.125, 1]]
    spreadsheet(sheet, [], [["Condition", "what it is"]], lines)
    chop, echo = listening_tests.rows("tcd_voip", str(tmp_path))
    assert (chop["system"], chop["speaker"], chop["mos"], chop["votes"]) == ("CHOP-01", "FA", 4.541666667, 24)
    assert echo["uri"] == str(tmp_path / "Test Set/echo/C_20_ECHO_ML.wav") and echo["system"] == "ECHO-20"
    spreadsheet(sheet, [["Something", "else"]])
    with pytest.raises(TableError, match="no spreadsheet with columns"):
        listening_tests.rows("tcd_voip", str(tmp_path))
    sheet.write_bytes(b"no zip")
    with pytest.raises(TableError, match="cannot be read as a spreadsheet"):
        listening_tests.rows("tcd_voip", str(tmp_path))
    with ZipFile(sheet, "w") as archive:
        archive.writestr("[Content_Types].xml", "no XML")
    with pytest.raises(TableError, match="cannot be read as a spreadsheet"):
        listening_tests.rows("tcd_voip", str(tmp_path))
    spreadsheet(sheet, [header, ["C_01_CHOP_FA.wav", 1, 4.5, 5]])
    touch(tmp_path, "Copy/C_01_CHOP_FA.wav")
    with pytest.raises(TableError, match=r"1 recordings lie in more than one folder \(C_01_CHOP_FA.wav\)"):
        listening_tests.rows("tcd_voip", str(tmp_path))
    sheet.unlink()
    with pytest.raises(TableError, match="no spreadsheet with columns"):
        listening_tests.rows("tcd_voip", str(tmp_path))
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    with pytest.raises(LibraryError, match="pip install openpyxl"):
        listening_tests.rows("tcd_voip", str(tmp_path))


def test_mushra_becomes_1_to_5(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav", "c.wav")
    write(tmp_path / "labels.csv", "wav_path,score,system_id", "a.wav,0,opus", "b.wav,100,lyra", "c.wav,50,lyra")
    rows = listening_tests.rows("genspeech", str(tmp_path))
    assert [(row["mos"], row["system"]) for row in rows] == [(1, "opus"), (5, "lyra"), (3, "lyra")]
    write(tmp_path / "labels.csv", "wav_path,score", "a.wav,101", "b.wav,good")
    with pytest.raises(TableError, match=r"2 rows cannot be used .*mos 5.04 is not a number .*'good'"):
        listening_tests.rows("genspeech", str(tmp_path))


def challenge(root: Path, num_systems: int = 8, num_inputs: int = 8) -> Path:
    lines = []
    for system in range(num_systems):
        for number in range(num_inputs):
            touch(root, f"s{system}/{number}.wav")
            lines.append(f"s{system}/{number}.wav,3,s{system},i{number},en")
    write(root / "labels.csv", "wav_path,score,system_id,input_id,language", *lines)
    return root


@pytest.mark.parametrize("name", ["dns_2", "plc_2022", "sig_2023"])
def test_a_quarter_of_systems_and_inputs_is_held_out(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = str(challenge(tmp_path))
    caplog.set_level(logging.INFO)
    rows = listening_tests.rows(name, root)
    assert splits(rows) == {"train": 36, "validation": 4} and rows == listening_tests.rows(name, root)
    parts = [
        {key: {r[key] for r in rows if r["split"] == split} for key in ("system", "input_id")} for split in splits(rows)
    ]
    assert parts[0]["system"].isdisjoint(parts[1]["system"]) and parts[0]["input_id"].isdisjoint(parts[1]["input_id"])
    paper = listening_tests.READERS[name].paper
    assert (
        paper
        and f"4 validate with both the system and the input held out, 28 with either (the paper: {paper[0]}"
        in (caplog.text)
    )
    either = listening_tests.rows(name, root, "either")
    assert splits(either) == {"train": 36, "validation": 28}
    assert [row for row in either if row["split"] == "train"] == [row for row in rows if row["split"] == "train"]


@pytest.mark.parametrize("name", ["dns_3", "dns_3_fb", "plc_2024"])
def test_later_challenges_are_for_tests(tmp_path: Path, name: str) -> None:
    assert splits(listening_tests.rows(name, str(challenge(tmp_path, 2, 2)))) == {"test": 4}


def test_sig_2024_leaves_the_inputs_of_sig_2023_out(tmp_path: Path) -> None:
    root = challenge(tmp_path, 2, 3)
    with pytest.raises(TableError, match=r"sig_2023.csv is missing"):
        listening_tests.rows("sig_2024", str(root))
    write(root / "sig_2023.csv", "wav_path,score,system_id,input_id", "x.wav,3,s9,i1")
    assert {row["input_id"] for row in listening_tests.rows("sig_2024", str(root))} == {"i0", "i2"}


def test_the_plain_csv_carries_what_is_known(tmp_path: Path) -> None:
    touch(tmp_path, "wav/a.wav", "wav/b.wav")
    header = "wav_path,score,system_id,input_id,dataset,split,votes,remark"
    write(tmp_path / "labels.csv", header, "wav/a.wav,1,s,i,d,train,8,loud", r"wav\b.wav,5,,,,validation,,")
    first, second = listening_tests.rows("csv", str(tmp_path))
    expected = {"mos": 1.0, "system": "s", "input_id": "i", "dataset": "d", "split": "train", "votes": 8}
    assert first == {**expected, "kind": "speech", "uri": str(tmp_path / "wav/a.wav")}
    assert second == {"mos": 5.0, "dataset": "csv", "split": "validation", "kind": "speech"} | {
        "uri": str(tmp_path / "wav/b.wav")
    }
    assert listening_tests.rows("csv", str(tmp_path / "labels.csv")) == [first, second]


def test_errors_count_everything_and_show_ten(tmp_path: Path) -> None:
    touch(tmp_path, "a.wav", "b.wav", "c.wav", "d.wav")
    missing = [f"m{number:02d}.wav,3,train" for number in range(12)]
    lines = ["a.wav,5.5,train", "a.wav,3,train", "b.wav,nan,train", "c.wav,,train", "d.wav,3,fold1"]
    write(tmp_path / "labels.csv", "wav_path,score,split", *missing, *lines)
    with pytest.raises(TableError) as caught:
        listening_tests.rows("csv", str(tmp_path))
    message = str(caught.value)
    assert "12 files are missing (" in message and "m09.wav, ...)" in message and "m10.wav" not in message
    assert f"2 rows cannot be used ({tmp_path}/d.wav: split 'fold1' is unknown" in message
    assert "a.wav: mos '5.5' is not a number from 1 to 5" in message and "labels.csv, line 14" in message


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (["wav_path,mos", "a.wav,3"], r"columns \['score'\] are missing; it has \['wav_path', 'mos'\]"),
        (["wav_path,score", "a.wav"], r"a.wav: its row has 1 fields instead of 2 \(.*labels.csv, line 2\)"),
        (["wav_path,score"], "no clip has a score"),
    ],
)
def test_lists_of_another_form_are_refused(tmp_path: Path, content: list[str], told: str) -> None:
    write(tmp_path / "labels.csv", *content)
    with pytest.raises(TableError, match=told):
        listening_tests.rows("csv", str(tmp_path))


def test_a_list_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_bytes(b"wav_path,score\n\xff.wav,3\n")
    with pytest.raises(TableError, match=r"labels.csv, line 2: byte 0xff is not UTF-8"):
        listening_tests.rows("csv", str(tmp_path))


def test_a_corpus_may_lie_behind_a_url() -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/scored/labels.csv", b"wav_path,score\nwav/a.wav,3\nwav/b.wav,3\n")
    fs.pipe("/scored/wav/a.wav", b"")
    with pytest.raises(TableError, match=r"1 files are missing \(memory://scored/wav/b.wav\)"):
        listening_tests.rows("csv", "memory://scored/")
    fs.pipe("/scored/latin.csv", b"wav_path,score\n\xff.wav,3\n")
    with pytest.raises(TableError, match=r"latin.csv, line 2: byte 0xff is not UTF-8"):
        listening_tests.rows("csv", "memory://scored/latin.csv")
    fs.pipe("/scored/wav/b.wav", b"")
    assert [row["uri"] for row in listening_tests.rows("csv", "memory://scored")] == [
        f"memory://scored/wav/{n}.wav" for n in "ab"
    ]


def test_other_counts_than_the_papers_are_a_warning(nisqa: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        listening_tests.rows("nisqa_for", str(nisqa))
    assert "nisqa_for has 0, 0 and 2 clips to train, validate and test on; the paper has 0, 0 and 240" in caplog.text


def test_half_a_choice_is_refused() -> None:
    for half in (Ingest(out="o", corpus="csv"), Ingest(out="o", root="r")):
        with pytest.raises(RunError, match="give --corpus NAME and --root DIR"):
            ingest.scored_rows(half)


def test_a_corpus_becomes_a_manifest(tmp_path: Path, local_ray: None) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(16_000), 16_000)
    write(tmp_path / "labels.csv", "wav_path,score,system_id,input_id,split,votes", "a.wav,2.5,s,i,test,7")
    ingest.run(Ingest(out=str(tmp_path / "m"), corpus="csv", root=str(tmp_path)))
    (row,) = table.read(f"{tmp_path}/m/clips.parquet", "clip.v1").to_pylist()
    assert (row["mos"], row["votes"], row["system"], row["input_id"], row["split"]) == (2.5, 7, "s", "i", "test")
