"""Runs on Ray Train, with a student of 3,000 parameters."""

import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from label_runs import label_run
from small_training import Stopped
from speechdistill.io import storage
from speechdistill.io.errors import RunError
from speechdistill.models import parameters
from speechdistill.models.student import load_student
from speechdistill.tracking.run import Tracking
from speechdistill.training.batches import Mix
from speechdistill.training.loop import Loop
from speechdistill.training.progress import Board, Progress
from speechdistill.training.ray_train import Job, fit
from speechdistill.training.recipe import Around, Training
from speechdistill.training.recipes.distill import Distill, DistillRecipe, tiny
from speechdistill.training.side_by_side import Run, train

TRAINING = Training(steps=30, learning_rate=1e-3, validate_every=10)


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> str:
    return label_run(tmp_path_factory.mktemp("labels"), 24 * 20)


def config(labels: str) -> Distill:
    return Distill(
        student=tiny(), mix=Mix(shards=(labels,), labeled_percent=0, crop_s=0.08), provenance={"teacher": "milli"}
    )


@dataclass(frozen=True)
class Dies:
    """A recipe whose worker is killed when it is made."""

    def __call__(self) -> DistillRecipe:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError


def job(out: Path, make: Callable[[], DistillRecipe], **more: object) -> Job:
    return Job(make=make, training=TRAINING, out=str(out), identity={"seed": 0}, **more)  # type: ignore[arg-type]


def test_a_run_that_loses_a_worker_ends_with_its_best_student_and_is_done_once(
    labels: str, tmp_path: Path, local_ray: None
) -> None:
    step, training = random.randrange(2, 30), replace(TRAINING, dtype="float64")
    print(f"killed at update {step}")
    make = Stopped(config(labels), str(tmp_path), step)
    one = replace(job(tmp_path / "run", make, workers=(1, 2), cpus=0.5), training=training)
    progress = Progress(6)
    summary = fit(one, progress)
    assert (tmp_path / "reached").exists()
    told = progress.read()
    assert (summary["steps"], told.step, told.workers) == (30, 30, 2)
    validated = {
        point.step: point.figures["validation/mse"] for point in told.points if "validation/mse" in point.figures
    }
    assert list(validated) == [10, 20, 30]
    assert summary["best"]["mse"] == min(validated.values()) == validated[summary["best"]["step"]]
    undisturbed = Loop(config(labels).make(), training)
    for number, *_ in undisturbed.run(30):
        if number in validated:  # two workers add in another order
            assert undisturbed.validate()["mse"] == pytest.approx(validated[number], abs=1e-6)
    best = load_student(f"{tmp_path}/run/best")
    assert best.provenance == {"teacher": "milli"}
    assert best.network.config.segment_samples == 1280  # as long as its crops
    mse = config(labels).make().validate(Around(30, best.network, {}), 0, 1).figures["mse"]
    assert mse == pytest.approx(summary["best"]["mse"], rel=1e-4)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    assert fit(one, Progress(6)) == summary
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    with pytest.raises(RunError, match="seed: 0 -> 1"):
        fit(replace(one, identity={"seed": 1}), Progress(6))


def test_a_run_is_given_up_after_starts_that_brought_nothing_or_an_error_for_good() -> None:
    progress = Board(2)
    assert [progress.started(step, 1) for step in (0, 0, 10, 10)] == [None] * 4
    progress.failed("OSError: away", for_good=False)
    progress.failed("ConnectionError: another worker's", for_good=False)
    assert progress.started(10, 1) == "2 starts from step 10 made no new checkpoint: OSError: away"
    progress.failed("ConnectionError: another worker's", for_good=False)
    progress.failed("TableError: damaged", for_good=True)
    assert progress.started(20, 1) == "TableError: damaged"


def test_points_that_an_earlier_driver_told_are_not_told_again() -> None:
    progress = Board(6, told=20)
    for step in (10, 20, 30, 30, 25, 40):
        progress.point(step, {"mse": 1.0})
    assert [point.step for point in progress.read().points] == [30, 30, 40]


@pytest.mark.slow  # test_loop.py has it without Ray
def test_a_score_that_is_not_finite_ends_the_run_at_once_with_its_name(tmp_path: Path, local_ray: None) -> None:
    labels = label_run(tmp_path / "labels", 48)
    (first, _) = sorted((tmp_path / "labels" / "shards").iterdir())
    rows = pq.read_table(first)
    scores = [float("nan") if i == 3 else score for i, score in enumerate(rows["score"].to_pylist())]
    pq.write_table(rows.set_column(rows.schema.get_field_index("score"), "score", [scores]), first, row_group_size=16)
    with pytest.raises(RunError, match=rf"not finite at step \d, from 1 samples: {labels}#3; progress so far is saved"):
        fit(job(tmp_path / "run", config(labels).make, cpus=0.5), Progress(6))


@pytest.mark.slow  # three or ten runs of Ray Train
@pytest.mark.parametrize("count", [3, 10])
def test_one_that_fails_does_not_stop_the_others(labels: str, tmp_path: Path, local_ray: None, count: int) -> None:
    parent = Tracking(str(tmp_path), "train-students", "students", {})
    runs = []
    for number in range(count):
        out = tmp_path / f"tiny{number}"
        make = Dies() if number == 1 else config(labels).make
        tracking = Tracking(str(out), "train-students", out.name, {}, parent)
        runs.append(
            Run(
                name=out.name,
                size=parameters.of_student(tiny()),
                job=job(out, make, cpus=0.5, starts=1),
                tracking=tracking,
            )
        )
    train(runs, at_once=2)
    parent.end("FAILED")
    assert [run.state for run in runs] == ["failed" if number == 1 else "done" for number in range(count)]
    assert storage.read_json(f"{tmp_path}/tiny2/summary.json")["steps"] == 30
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("train-students").experiment_id
    by_name = {run.info.run_name: run for run in client.search_runs([experiment])}
    ended = {run.name: "FINISHED" if run.state == "done" else "FAILED" for run in runs}
    assert {name: run.info.status for name, run in by_name.items()} == {"students": "FAILED", **ended}
    parents = {name: run.data.tags.get("mlflow.parentRunId") for name, run in by_name.items() if name != "students"}
    assert set(parents.values()) == {by_name["students"].info.run_id}
    metrics = by_name["tiny0"].data.metrics
    assert metrics["best_val_mse"] == runs[0].summary["best"]["mse"] and "loss" in metrics
