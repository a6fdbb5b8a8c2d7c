"""The command that trains students: what it makes of its options, and one run from shards to a scored file."""

import json
import re
from pathlib import Path

import pytest
import ray
import soundfile

from configs import config_of
from label_runs import label_run, some_clips
from manifests import voice
from speechdistill import cli
from speechdistill.commands import report, train_students
from speechdistill.commands.train_students import TrainStudents
from speechdistill.data import heard, scored_clips
from speechdistill.io import checkpoint, storage, table
from speechdistill.io.errors import RunError
from speechdistill.io.options import OptionError
from speechdistill.training import launch


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return label_run(tmp_path_factory.mktemp("labels"), 24 * 20)


def capacity(options: dict[str, object], runs: int) -> object:
    config = config_of(TrainStudents, out="out", **options)  # type: ignore[arg-type]
    return launch.capacity(config.place, runs)


@pytest.mark.parametrize(
    ("resources", "options", "expected"),
    [
        ({"CPU": 8}, {"workers": "1:8"}, ((1, 8), 0.0, 1)),
        ({"CPU": 8}, {"workers": "1:8", "variants": 10}, ((1, 1), 0.0, 8)),
        ({"CPU": 8}, {"workers": "2:8", "variants": 3}, ((2, 2), 0.0, 3)),
        ({"CPU": 32, "GPU": 4}, {"workers": "1:8", "variants": 2}, ((1, 2), 1.0, 2)),
        ({"CPU": 32, "GPU": 1}, {"gpus_per_worker": 0.25, "variants": 10}, ((1, 1), 0.25, 4)),
        ({}, {"workers": "1:8", "grow_to": "cpu=32,gpu=8"}, ((1, 8), 1.0, 1)),
        ({"CPU": 3}, {"workers": "2", "cpus_per_worker": 1.5}, ((2, 2), 0.0, 1)),
    ],
)
def test_runs_share_the_cluster(
    monkeypatch: pytest.MonkeyPatch, resources: dict[str, float], options: dict[str, object], expected: object
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: resources)
    variants = options.pop("variants", 1) if "variants" in options else 1
    assert capacity(options, variants) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": "0"}, "--workers is '0'"),
        ({"workers": "3:2"}, "--workers is '3:2'"),
        ({"workers": "4"}, "does not fit the cluster .2 CPUs"),
        ({"gpus_per_worker": 1.0}, "0 GPUs"),
        ({"gpus_per_worker": 0.5, "workers": "1:2"}, "is for one worker a run"),
        ({"grow_to": "cpu"}, "Invalid --grow-to: 'cpu'; use non-negative amounts"),
    ],
)
def test_a_run_that_never_fits_is_refused(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises((RunError, OptionError), match=message):
        capacity(options, 1)


def test_the_grid_of_mix_ins_is_one_command(labels: str, tmp_path: Path) -> None:
    rows = some_clips(tmp_path)
    storage.publish(table.parquet_bytes(rows), f"{tmp_path}/clips.parquet")
    config = config_of(
        TrainStudents,
        out=str(tmp_path / "out"),
        shards=(labels,),
        labeled=f"{tmp_path}/clips.parquet",
        variants="v0,v3",
        labeled_percent=(0, 10, 20, 40, 80, 100),
    )
    recipes = train_students._recipes(train_students._absolute(config))
    assert list(recipes) == [f"{name}-{percent}" for name in ("v0", "v3") for percent in (0, 10, 20, 40, 80, 100)]
    assert [recipe.mix.labeled_lanes for recipe in recipes.values()] == [0, 2, 4, 8, 16, 20] * 2
    heard = {name: len((recipe.provenance or {})["shards"]) for name, recipe in recipes.items()}
    assert {name for name, count in heard.items() if not count} == {"v0-100", "v3-100"}
    assert scored_clips.manifest(str(recipes["v0-0"].labeled)).equals(scored_clips.manifest(str(config.labeled)))


def test_what_is_held_out_and_heard_is_in_the_run_and_in_the_student(labels: str, tmp_path: Path) -> None:
    rows = some_clips(tmp_path)
    storage.publish(table.parquet_bytes(rows), f"{tmp_path}/clips.parquet")
    scored = {"labeled": f"{tmp_path}/clips.parquet", "labeled_percent": (0, 20)}
    config = config_of(TrainStudents, out=str(tmp_path / "out"), shards=(labels,), variants="tiny", **scored)
    recipes = train_students._recipes(train_students._absolute(config))
    train, validation = scored_clips.split(rows)
    for name, trained in (("tiny-0", None), ("tiny-20", train)):
        recipe = recipes[name]
        (held,) = recipe.held_out or ()
        provenance = dict(recipe.provenance or {})
        assert provenance["shards"][0]["held_out"] == held.about and held.about["test"]["samples"] >= 16
        (line,) = report.held_out(provenance["shards"])
        assert re.match(
            r"held out of the shards, by clip: \d+ samples of \d+ clips to choose the best, \d+ samples", line
        )
        assert provenance[checkpoint.CLIPS] == heard.record(trained, validation)
        data = train_students._job(config, name, recipe, (1, 1), 0.0).identity["data"]
        assert data["shards"] == provenance["shards"] and checkpoint.CLIPS not in data
    assert heard.marks(provenance, train["clip_id"].to_pylist()) == [heard.TRAINED] * len(train)
    assert heard.marks({"init": provenance}, [*validation["clip_id"].to_pylist(), "0" * 16]) == [
        *[heard.SELECTED] * len(validation),
        None,
    ]


def test_a_run_that_an_earlier_version_began_keeps_its_rule(
    labels: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(TrainStudents, out=str(tmp_path), shards=(labels,), variants="tiny")
    (new,) = train_students._recipes(train_students._absolute(config)).values()
    known = {"data": {"shards": [{"fingerprint": "x", "weight": 1.0}]}}
    storage.publish_json({"fingerprint": "x", "configuration": known}, f"{tmp_path}/tiny/run.json")
    (old,) = train_students._recipes(train_students._absolute(config)).values()
    assert "held_out" in (new.provenance or {})["shards"][0] and "held_out" not in (old.provenance or {})["shards"][0]
    assert old.make().batches.num_held_out == 16 + 8  # two row groups of 40
    assert "an earlier version began is resumed" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variants", "v0,v10"], "'v10' is unknown; choose from v0, v1"),
        (["--labeled-percent", "20"], "give --labeled"),
        (["--shards", "nowhere"], "nowhere: not a complete label run"),
        (["--label-transform", "none.json"], r"none\.json: no such file"),
        (["--shards", "small"], "nothing is left to validate on: 8 samples of 8 clips are too few"),
        (["--init", "nowhere"], "nowhere holds no checkpoint"),
        (["--labeled", "none.csv"], r"none\.csv"),
    ],
)
def test_what_is_wrong_is_told_before_the_work(
    labels: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    if options == ["--shards", "small"]:
        options = ["--shards", label_run(tmp_path / "small", 8)]
    shards = [] if "--shards" in options else ["--shards", labels]
    assert cli.main(["train-students", "--out", f"{tmp_path}/out", *shards, *options]) == 1
    error = capsys.readouterr().err

    assert re.search(rf"error: .*{message}", error), error


@pytest.mark.slow  # the demo goes the same way, in test_pseudolabel.py
def test_from_shards_to_a_scored_file(
    labels: str, tmp_path: Path, local_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    out = f"{tmp_path}/out"
    command = ["train-students", "--shards", labels, "--variants", "tiny", "--crop-s", "0.08", "--out", out]
    assert cli.main([*command, "--steps", "10", "--cpus-per-worker", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert f"best of tiny: {out}/tiny/best" in printed
    assert cli.main([*command, "--steps", "11", "--cpus-per-worker", "0.5"]) == 1
    assert "steps: 10 -> 11" in capsys.readouterr().out
    soundfile.write(tmp_path / "voice.wav", voice(2.0), 16000)
    by_folder, by_run = f"{out}/tiny/best", f"runs:/{printed.split('done')[1].split()[0]}/student"
    scores = []
    for model in (["--model", by_folder], ["--model", by_run, "--tracking", out]):
        assert cli.main(["score", f"{tmp_path}/voice.wav", *model, "--out", f"{tmp_path}/scores.json"]) == 0
        scores += [row["mos"] for row in json.loads((tmp_path / "scores.json").read_text())]
    assert scores[0] == scores[1]
