"""Scoring files: every file has a row, patterns find what they say, results appear whole."""

import csv
import io
import json
import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from manifests import voice
from speechdistill import cli
from speechdistill.commands import score
from speechdistill.io import audio, storage
from speechdistill.io.errors import StorageError
from speechdistill.models.label import Label, Unscorable
from speechdistill.models.options import TeacherOptions
from speechdistill.models.teachers import distillmos
from speechdistill.models.windowed import WindowScorer

RATE = audio.SAMPLE_RATE


@pytest.fixture(scope="module")
def teacher() -> WindowScorer:
    return distillmos.load(TeacherOptions(device="cpu"))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Good, silent and broken files: a.flac, deep/b.WAV, silent.wav, torn.wav, and what is no audio."""
    rng = np.random.default_rng(0)
    (tmp_path / "deep").mkdir()
    soundfile.write(tmp_path / "a.flac", 0.1 * rng.standard_normal(2 * RATE), RATE)
    soundfile.write(tmp_path / "deep" / "b.WAV", 0.1 * rng.standard_normal((44_100, 2)), 44_100)
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    (tmp_path / "torn.wav").write_bytes((tmp_path / "silent.wav").read_bytes()[:5000])
    (tmp_path / "README.md").write_text("not audio")
    (tmp_path / "._a.wav").write_bytes(b"what macOS leaves on other disks")
    return tmp_path


class Constant:
    """A teacher that says 3 of everything, and None of the first second."""

    name, weights_hash, intrusive = "constant", "0", False

    def label(self, waves: Sequence[np.ndarray]) -> list[Label | Unscorable]:
        return [Label(3.0, 0.0, None) for _ in waves]

    def timeline(self, wave: np.ndarray) -> list[tuple[float, float | None]]:
        return [(0.0, None), (1.0, 3.0)]


def test_every_file_has_a_row_with_a_score_or_the_reason(folder: Path, teacher: WindowScorer) -> None:
    paths = [*score.expand([str(folder)]), str(folder / "missing.wav"), str(folder / "README.md")]
    rows = list(score.score_files(paths, teacher))
    assert [row["path"] for row in rows] == paths
    assert all(list(row) == ["path", "duration_s", "mos", "error"] for row in rows)
    assert all((row["mos"] is None) != (row["error"] is None) for row in rows)
    a, b, silent, torn, missing, readme = rows
    (label,) = teacher.label([audio.load(str(folder / "a.flac"))])
    assert isinstance(label, Label)
    assert (a["mos"], a["duration_s"]) == (label.score, 2.0)
    assert 1 < b["mos"] < 5
    assert (silent["error"], silent["duration_s"]) == ("silent (peak below -80 dBFS)", 1.0)
    assert "truncated" in torn["error"]
    assert "FileNotFoundError" in missing["error"]
    assert "not audio" in readme["error"]


def test_timeline_has_a_row_per_second_and_the_errors_too(
    folder: Path, tmp_path: Path, teacher: WindowScorer, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.wav", np.append(voice(5.0), 0.1 * rng.standard_normal(5 * RATE)), RATE)
    paths = [str(tmp_path / "long.wav"), *(str(folder / name) for name in ("a.flac", "silent.wav", "torn.wav"))]
    rows = list(score.score_files(paths, teacher, timeline=True))
    assert [Path(row["path"]).name for row in rows] == [*["long.wav"] * 10, "a.flac", "silent.wav", "torn.wav"]
    assert [row["start_s"] for row in rows] == [*map(float, range(10)), 0.0, None, None], "a short file has one score"
    assert "a.flac: 2.00 s is shorter than one window of 7.68 s" in caplog.text and "long.wav" not in caplog.text
    assert all(list(row) == ["path", "start_s", "mos", "error"] for row in rows)
    assert all((row["mos"] is None) != (row["error"] is None) for row in rows)


def test_a_silent_second_has_a_row_that_says_so(folder: Path) -> None:
    first, second = score.score_files([str(folder / "a.flac")], Constant(), timeline=True)
    assert (first["mos"], first["error"]) == (None, "silent")
    assert (second["mos"], second["error"]) == (3.0, None)


def test_the_command_takes_a_hop(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(1)
    long = np.concatenate([0.1 * rng.standard_normal(5 * RATE), 0.3 * np.sin(np.arange(4 * RATE) / 5)])
    soundfile.write(folder / "long.wav", long, RATE)

    def command(*options: str) -> tuple[int, float]:
        code = cli.main(["score", str(folder / "long.wav"), "--out", str(tmp_path / "out.json"), *options])
        (row,) = json.loads((tmp_path / "out.json").read_text())
        return code, row["mos"]

    wave = audio.load(str(folder / "long.wav"))
    for hop_s, options in ((1.0, []), (7.68, ["--hop-s", "7.68"])):
        (label,) = distillmos.load(TeacherOptions(device="cpu", hop_s=hop_s)).label([wave])
        assert isinstance(label, Label)
        assert command(*options) == (0, label.score)
    assert command("--hop-s", "8")[0] == 1
    assert "hop_s 8.0; choose seconds above 0 and up to 7.68" in capsys.readouterr().err


def test_errors_of_any_kind_become_rows(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> np.ndarray:
        raise RuntimeError("AccessDenied")

    monkeypatch.setattr(audio, "load", refuse)
    (row,) = score.score_files(["s3://bucket/a.wav"], Constant())
    assert row["error"] == "RuntimeError: AccessDenied"


def test_the_next_file_is_decoded_while_one_is_scored(monkeypatch: pytest.MonkeyPatch) -> None:
    loading = {name: threading.Event() for name in "abcd"}

    def load(path: str) -> np.ndarray:
        assert threading.current_thread() is not threading.main_thread()
        loading[path].set()
        return np.ones(RATE, np.float32)

    class Waiting(Constant):
        def label(self, waves: Sequence[np.ndarray]) -> list[Label | Unscorable]:
            if not loading["b"].wait(timeout=30):
                raise AssertionError("b was not decoded during a")
            assert not loading["c"].is_set(), "only one file ahead"
            return super().label(waves)

    monkeypatch.setattr(audio, "load", load)
    rows = score.score_files(list("abcd"), Waiting())
    assert next(rows)["path"] == "a"
    del rows  # closes the generator: nothing more is decoded
    assert not loading["d"].is_set()


def test_expand_finds_files_folders_and_globs_once_and_sorted(folder: Path) -> None:
    (folder / "take[1].wav").write_bytes(b"x")
    (folder / "x.raw").write_bytes(b"x")

    def found(*patterns: str) -> list[str]:
        paths = score.expand([str(folder / pattern) for pattern in patterns])
        return [str(Path(path).relative_to(folder)) for path in paths]

    assert found("") == ["a.flac", "deep/b.WAV", "silent.wav", "take[1].wav", "torn.wav"]
    assert found("README.md") == ["README.md"]  # named: its row will say why not
    assert found("take[1].wav") == ["take[1].wav"]
    assert found("*.wav", "silent.wav", "a.flac") == ["silent.wav", "take[1].wav", "torn.wav", "a.flac"]
    assert found("**") == ["a.flac", "deep/b.WAV", "silent.wav", "take[1].wav", "torn.wav"]
    assert found("**/*.WAV") == ["deep/b.WAV"]
    assert found("*.raw") == ["x.raw"]
    assert found("deep", "deep/*") == ["deep/b.WAV"]


def test_expand_passes_urls_on_and_globs_them() -> None:
    for name in ("one.wav", "two.flac", "notes.txt"):
        fsspec.filesystem("memory").pipe_file(f"/scores/{name}", b"x")
    assert score.expand(["https://host/a.wav?signed=1"]) == ["https://host/a.wav?signed=1"]
    assert score.expand(["memory://scores/*"]) == ["memory:///scores/one.wav", "memory:///scores/two.flac"]


@pytest.mark.parametrize("pattern", ["nothing.wav", "no*thing", "empty", "memory://void/*.wav"])
def test_a_pattern_that_matches_nothing_is_an_error(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError) as error:
        score.expand([pattern])
    assert repr(pattern) in str(error.value)


ROWS = [
    {"path": "a,\n.wav", "duration_s": 1.5, "mos": 3.25, "error": None},
    {"path": "caf\udce9.wav", "duration_s": None, "mos": None, "error": "corrupt"},  # a name that is no UTF-8
]


def test_results_read_back_from_csv_parquet_and_json(tmp_path: Path) -> None:
    named = [ROWS[0], ROWS[1] | {"path": r"caf\udce9.wav"}]
    for suffix in ("csv", "parquet", "json"):
        score.write(iter(ROWS), str(tmp_path / f"scores.{suffix}"))
    assert json.loads((tmp_path / "scores.json").read_text()) == named
    assert pq.read_table(tmp_path / "scores.parquet").to_pylist() == named
    with (tmp_path / "scores.csv").open(newline="") as file:
        read = list(csv.DictReader(file))
    assert read == [{k: "" if v is None else str(v) for k, v in row.items()} for row in named]
    assert {file.name for file in tmp_path.iterdir()} == {"scores.csv", "scores.parquet", "scores.json"}


def test_columns_without_a_value_keep_their_type(tmp_path: Path) -> None:
    score.write(ROWS[1:], str(tmp_path / "scores.parquet"))
    fields = pq.read_schema(tmp_path / "scores.parquet")
    assert (fields.field("mos").type, fields.field("error").type) == (pa.float64(), pa.string())


def test_without_a_file_the_rows_are_printed_as_csv(capsys: pytest.CaptureFixture[str]) -> None:
    score.write(ROWS[1:])
    assert capsys.readouterr().out == "path,duration_s,mos,error\n" + r"caf\udce9.wav" + ",,,corrupt\n"


def test_another_extension_is_refused_before_any_work(tmp_path: Path) -> None:
    def rows() -> Iterator[score.Row]:
        raise AssertionError("scored in vain")
        yield

    with pytest.raises(ValueError, match=r"'\.xlsx'; choose from \.csv, \.parquet, \.json"):
        score.write(rows(), str(tmp_path / "scores.xlsx"))


def test_a_failure_while_scoring_leaves_the_older_file(tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    out.write_text("older")

    def rows() -> Iterator[score.Row]:
        yield ROWS[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score.write(rows(), str(out))
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older"]


@pytest.fixture
def constant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "load_teacher", lambda *_, **__: Constant())


def test_without_paths_it_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["score"]) == 1
    assert capsys.readouterr().err == (
        "error: there is nothing to score; give files, folders, globs or URLs of audio\n"
    )


def test_it_ends_with_what_it_wrote_and_how_many_have_no_score(
    folder: Path, constant: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(folder / "out" / "scores.csv")
    assert cli.main(["score", str(folder), "--out", out]) == 1
    told = capsys.readouterr()
    assert told.out == f"wrote {out}: 4 files, 1 without a score\n"
    assert f"skipped (hidden or system) × 1: '{folder}/._a.wav'\n" in told.err
    assert f"skipped .md × 1: '{folder}/README.md'\n" in told.err
    assert cli.main(["score", str(folder / "deep"), "--timeline", "--out", out]) == 0
    assert capsys.readouterr().out == f"wrote {out}: 1 file, 0 without a score\n"


@pytest.mark.parametrize("out", ["a.flac/scores.csv", "folder.csv", "/proc/scores.csv", "nothing://x/scores.csv"])
def test_an_output_that_cannot_be_written_is_told_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], out: str
) -> None:
    def load(*_: object, **__: object) -> None:
        raise AssertionError("loaded in vain")

    (folder / "folder.csv").mkdir()
    monkeypatch.setattr(score, "load_teacher", load)
    given = out if "://" in out else str(folder / out)
    assert cli.main(["score", str(folder), "--out", given]) == 1
    assert given in capsys.readouterr().err


def test_names_are_escaped_for_a_terminal_that_lacks_their_letters(
    folder: Path, constant: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "Björk.flac").write_bytes((folder / "a.flac").read_bytes())
    terminal = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert cli.main(["score", str(folder / "Björk.flac"), str(folder / "a.flac")]) == 0
    rows = terminal.buffer.getvalue().decode("ascii")
    assert rows.splitlines()[1:] == [rf"{folder}/Bj\xf6rk.flac,2.0,3.0,", f"{folder}/a.flac,2.0,3.0,"]


def _kept(message: str) -> str:
    return Path(message.partition("all rows are in ")[2].partition(";")[0]).read_text()


def test_rows_that_cannot_be_printed_or_written_are_kept(
    folder: Path, constant: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    expected = f"path,duration_s,mos,error\n{folder}/a.flac,2.0,3.0,\n"
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as pipe:
        patch.setattr("sys.stdout", pipe)
        assert cli.main(["score", str(folder / "a.flac")]) == 1
    told = capsys.readouterr().err
    assert "not all rows could be printed" in told and _kept(told) == expected

    def full(data: bytes, uri: str) -> None:
        raise StorageError("the disk is full", "free some space")

    monkeypatch.setattr(storage, "publish", full)
    assert cli.main(["score", str(folder / "a.flac"), "--out", str(folder / "x.parquet")]) == 1
    told = capsys.readouterr().err
    assert "the disk is full" in told and _kept(told) == expected


@pytest.mark.parametrize("arguments", [["--help"], ["pseudolabel", "--help"], ["recipe", "show", "as_is"]])
def test_a_reader_that_has_gone_ends_no_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr("sys.stdout", pipe)
        try:
            assert cli.main(arguments) == 0
        except SystemExit as end:
            assert not end.code
