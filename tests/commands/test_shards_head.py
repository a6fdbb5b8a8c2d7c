"""`speechdistill shards head`: the first samples of a label run, as a table and as WAV files."""

from pathlib import Path

import pytest
import soundfile

from comparisons import label_run
from mlflow_runs import student
from speechdistill import cli


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("labels")
    return label_run(folder, student(folder / "student", 0))


def test_the_first_samples_are_a_table(labels: str, capsys: pytest.CaptureFixture[str]) -> None:
    shard = str(next(Path(labels, "shards").glob("part-00000000-*.parquet")))
    tables = []
    for place in (labels, f"{labels}/shards", shard, f"file://{shard}"):
        assert cli.main(["shards", "head", place, "--rows", "3"]) == 0
        tables.append(capsys.readouterr().out.splitlines())
    assert tables[0][0].split() == ["id", "score", "speaker", "duration", "steps"]
    assert [line.split()[0] for line in tables[0][1:]] == ["0", "1", "2"]
    assert all(" s  " in line and 1 <= float(line.split()[1]) <= 5 for line in tables[0][1:])
    assert tables.count(tables[0]) == 4
    assert cli.main(["shards", "head", labels, "--rows", "20"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 21, "rows of one shard alone"


def test_samples_are_exported_with_their_clean_segments(labels: str, tmp_path: Path) -> None:
    assert cli.main(["shards", "head", labels, "--rows", "2", "--wav", str(tmp_path)]) == 0
    names = {f"{i}-{kind}.wav" for i in range(2) for kind in ("degraded", "clean")}
    assert {file.name for file in tmp_path.iterdir()} == names
    seconds = {name: soundfile.info(tmp_path / name).duration for name in names}
    assert seconds["0-clean.wav"] == seconds["0-degraded.wav"] > 1


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["nowhere"], 1, "nowhere holds no shards of labels; give the --out folder of pseudolabel"),
        (["CLIPS"], 1, "is not a shard of labels: it lacks num_samples, plan, sample_id, score"),
        (["nowhere", "--rows", "0"], 2, "--rows is 0"),
    ],
)
def test_other_places_are_refused(
    options: list[str], code: int, message: str, labels: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [str(Path(labels).parent / "clips.parquet") if word == "CLIPS" else word for word in options]
    assert cli.main(["shards", "head", *options]) == code
    assert message in capsys.readouterr().err
