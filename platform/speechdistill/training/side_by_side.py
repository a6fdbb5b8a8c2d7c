"""Several training runs side by side: their places in the cluster, their progress lines, their MLflow runs."""

import math
import sys
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
from speechdistill.training.recipe import BEST_VALIDATION

_POLL_S = 1.0
_LINE_S = 30.0  # between lines in a log, where a bar would be a line each second
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps [{elapsed}<{remaining}{postfix}]"
"""Without tqdm's own rate: that of the workers is in the postfix, and the first one counts the wait for workers."""


@dataclass
class Run:
    """A training run and its progress. `state` is waiting, training, done or failed.

    `clips` is the number of validation clips, and `scale` the scale of its figures, as words for a table.
    """

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
    clips: int = 0
    scale: str = "in MOS"


def train(runs: list[Run], at_once: int) -> None:
    """Train the largest first, `at_once` side by side."""
    waiting = sorted(runs, key=lambda run: -run.size.stored)
    going: dict[Any, Run] = {}
    # A run's controller lives on the node of its `fit`: on this one, so that it outlives every other node.
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
                if one.error and len(runs) > 1:  # the other runs may take days
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
        best = {f"{BEST_VALIDATION}{key}": value for key, value in run.summary["best"].items() if key != "step"}
        run.tracking.metrics(best, run.summary["steps"])
    run.tracking.end("FINISHED" if run.state == "done" else "FAILED")


class _Bars:
    """A progress line for each run that trains: a bar on a terminal, and lines with `_LINE_S` between them in a log."""

    def __init__(self, runs: list[Run]) -> None:
        self._runs = runs
        self._bars: dict[str, Any] = {}
        self._is_log = not sys.stderr.isatty()
        self._last = -math.inf

    def __enter__(self) -> "_Bars":
        return self

    def show(self) -> None:
        if self._is_log:
            self._log()
            return
        for run in self._runs:
            if run.state == "training" and run.name not in self._bars:
                self._bars[run.name] = tqdm(
                    total=run.job.training.steps, desc=run.name, dynamic_ncols=True, bar_format=_BAR
                )
            bar = self._bars.get(run.name)
            if bar is None or run.told is None:
                continue
            bar.n = max(bar.n, run.told.step)
            bar.set_postfix_str(_figures(run.told), refresh=True)
            if run.state in ("done", "failed"):
                bar.close()
                del self._bars[run.name]

    def _log(self) -> None:
        now = time.monotonic()
        is_due = now - self._last >= _LINE_S
        for run in self._runs:
            has_ended = run.state in ("done", "failed") and run.name not in self._bars
            if run.told is not None and (has_ended or (is_due and run.state == "training")):
                self._last = now
                steps = f"{run.told.step:,} of {run.job.training.steps:,} steps"
                print(f"{run.name}: {run.state}, {steps}, {_figures(run.told)}", file=sys.stderr, flush=True)
            if has_ended:
                self._bars[run.name] = None

    def __exit__(self, *_: object) -> None:
        for bar in filter(None, self._bars.values()):
            bar.close()


def _figures(told: Told) -> str:
    workers = f"{told.workers} worker{'s' * (told.workers != 1)}" if told.workers else "waiting for resources"
    figures = f"loss {told.loss:.4f}, {told.steps_per_s:.2f} steps/s, " if told.steps_per_s else ""
    return figures + workers
