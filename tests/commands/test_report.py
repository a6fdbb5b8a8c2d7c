"""The text that commands print at their end."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from speechdistill.commands import report, train_students
from speechdistill.commands.results import Kept
from speechdistill.engine.cost import Estimate
from speechdistill.models.parameters import Parameters
from speechdistill.training import side_by_side
from speechdistill.training.launch import TrainedRun
from speechdistill.training.progress import Told


def trained(**more: Any) -> TrainedRun:
    known = {"variant": "v0", "parameters": 176_146, "trainable": 176_146, "state": "done", "steps": 100}
    figures = {"train_s": 61.2, "best_step": 50, "mse": 0.25, "pcc": 0.9, "clips": 16, "scale": "in MOS"}
    places = {"folder": "out/v0/best", "run_id": "abc", "error": None}
    return TrainedRun(**{**known, **figures, **places, **more})


def test_a_pcc_has_its_number_of_clips_and_an_mse_its_scale() -> None:
    failed = trained(variant="v1", state="failed", mse=None, pcc=None, folder=None, error="it broke", clips=0)
    text = report.trained([trained(scale="on the teacher's universal scale"), failed])
    header, row, other, scale, *rest = text.splitlines()
    column = header.split().index("clips")
    assert header.split()[:6] == ["variant", "parameters", "trainable", "PCC", "clips", "MSE"]
    assert row.split()[column] == "16" and other.split()[3:6] == ["–", "–", "–"]
    assert "universal scale" in scale
    assert rest == ["v1 failed: it broke", "best of v0: out/v0/best"]


def test_the_table_of_a_pruning_has_columns_for_what_is_known() -> None:
    one = Kept(
        name="remaining-50",
        remaining=0.5,
        nonzero=1_000,
        parameters=2_000,
        size_mb=8.0,
        cpu_s=0.62,
        mse=0.1,
        pcc=None,
        folder="out/pruned/remaining-50",
    )
    header, row, figures, *_ = report.pruned([one], 8).splitlines()
    assert "GPU time" not in header and "version" not in header and row.split()[-1] == "–"
    assert "8 validation clips" in figures and "cuda_s" not in one.to_json()


@pytest.mark.parametrize(
    ("hours", "text"),
    [(0, "0 s"), (0.0005, "1.8 s"), (0.0125, "45 s"), (0.02, "72 s"), (0.25, "15.0 min"), (3.5, "3.50 h")],
)
def test_small_hours_are_minutes_and_seconds(hours: float, text: str) -> None:
    assert report.duration(hours) == text


def test_the_dry_run_of_a_small_job_says_what_it_costs() -> None:
    figures = {"cpu_hours": 0.01, "gpu_hours": 0.0, "output_gb": 0.004, "hours": 0.005, "money": 0.0005}
    text = report.estimate(Estimate(num_samples=64, trial_samples=64, trial_rejected=0, **figures), "cpu=0.05")
    assert "36 s" in text and "18 s" in text and "4 MB" in text and "0.0005" in text and "0.00 h" not in text


def test_the_next_command_names_the_parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(train_students, "run_id", lambda out: "0123")
    line = train_students.next_command(f"{tmp_path}/out")
    assert line == f"next: speechdistill promote --run best-of:0123 --eval CLIPS --tracking {tmp_path}/out"
    monkeypatch.setattr(train_students, "run_id", lambda out: None)  # MLflow has not answered yet
    assert (
        train_students.next_command(f"{tmp_path}/out")
        == f"next: speechdistill promote --run {tmp_path}/out --eval CLIPS"
    )


def test_a_log_file_gets_few_lines_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    log, now = io.StringIO(), [0.0]
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setattr(side_by_side.time, "monotonic", lambda: now[0])
    job: Any = SimpleNamespace(training=SimpleNamespace(steps=1_000))
    run = side_by_side.Run("v0", Parameters(1, 1, 1), job, tracking=None, state="training")  # type: ignore[arg-type]
    with side_by_side._Bars([run]) as bars:
        for second in range(100):
            now[0], run.told = float(second), Told(second, 0.5, 1.25, 2, [])
            bars.show()
        run.state = "done"
        bars.show()
        bars.show()
    lines = log.getvalue().splitlines()
    assert len(lines) == 5 and lines[0] == "v0: training, 0 of 1,000 steps, loss 0.5000, 1.25 steps/s, 2 workers"
    assert lines[-1].startswith("v0: done, 99 of 1,000 steps")
    assert all(line.count("/s") == 1 for line in lines)
