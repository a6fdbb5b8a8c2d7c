"""Several training runs side by side: their places in the cluster, their progress lines, their MLflow runs."""

import time
from dataclasses import dataclass, field
from typing import Any

import ray
from tqdm import tqdm

from speechdistill.engine import cluster
from speechdistill.models.parameters import Parameters
from speechdistill.tracking.run import Tracking
from speechdistill.training.progress import Progress, Told
from speechdistill.training.ray_train import Job, fit

_POLL_S = 1.0


@dataclass
class Run:
    """One variant on its way. `state` is waiting, training, done or failed."""

    name: str
    size: Parameters
    job: Job
    tracking: Tracking
    state: str = "waiting"
    progress: Progress | None = None
    told: Told | None = None
    summary: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    started: float = field(default_factory=time.monotonic)
    train_s: float = 0.0


def train(runs: list[Run], at_once: int) -> None:
    """The largest first, `at_once` side by side."""
    waiting = sorted(runs, key=lambda run: -run.size.stored)
    going: dict[Any, Run] = {}
    # A run's controller lives on the node of its `fit`: here, so that it outlives every other node.
    driver = ray.remote(num_cpus=0, max_retries=0)(fit).options(scheduling_strategy=cluster.this_node())
    with _Bars(runs) as bars:
        while waiting or going:
            while waiting and len(going) < at_once:
                one = waiting.pop(0)
                one.state, one.started = "training", time.monotonic()
                one.progress = Progress(one.job.starts, one.tracking.last_step())
                going[driver.remote(one.job, one.progress)] = one
            ended, _ = ray.wait(list(going), timeout=_POLL_S)
            for one in going.values():
                _listen(one)
            for reference in ended:
                one = going.pop(reference)
                _end(one, reference)
                if one.error and len(runs) > 1:  # the others may take days
                    tqdm.write(f"{one.name} failed: {one.error}")
            bars.show()


def _listen(run: Run) -> None:
    assert run.progress is not None
    run.told = run.progress.read()
    for step, figures in run.told.points:
        run.tracking.metrics(figures, step)


def _end(run: Run, reference: Any) -> None:
    _listen(run)
    run.train_s = time.monotonic() - run.started
    try:
        run.summary, run.state = ray.get(reference), "done"
    except Exception as error:
        cause = cluster.cause(error)
        run.error, run.state = str(cause) or repr(cause), "failed"
    if run.state == "done":
        best = {f"best_val_{key}": value for key, value in run.summary["best"].items() if key != "step"}
        run.tracking.metrics(best, run.summary["steps"])
    run.tracking.end("FINISHED" if run.state == "done" else "FAILED")


class _Bars:
    """A progress line for each run on its way."""

    def __init__(self, runs: list[Run]) -> None:
        self._runs = runs
        self._bars: dict[str, Any] = {}

    def __enter__(self) -> "_Bars":
        return self

    def show(self) -> None:
        for run in self._runs:
            if run.state == "training" and run.name not in self._bars:
                self._bars[run.name] = tqdm(
                    total=run.job.training.steps, unit="step", desc=run.name, dynamic_ncols=True
                )
            bar = self._bars.get(run.name)
            if bar is None or run.told is None:
                continue
            workers = f"{run.told.workers} workers" if run.told.workers else "waiting for resources"
            bar.n = max(bar.n, run.told.step)
            figures = f"loss {run.told.loss:.4f}, {run.told.steps_per_s:.2f} steps/s, " if run.told.steps_per_s else ""
            bar.set_postfix_str(figures + workers, refresh=True)
            if run.state in ("done", "failed"):
                bar.close()
                del self._bars[run.name]

    def __exit__(self, *_: object) -> None:
        for bar in self._bars.values():
            bar.close()
