"""Progress of a training run: an actor to which workers report, and which the driver reads.

Ray Train itself only forwards figures that come with a checkpoint.
"""

import math
import time
from collections.abc import Mapping
from typing import NamedTuple

import ray

from speechdistill.engine import cluster

_POINT_S = 10.0  # between points of a curve
_UNTOLD = "no error was reported; a worker may have been killed"


class Point(NamedTuple):
    """Figures at a step."""

    step: int
    figures: dict[str, float]


class Told(NamedTuple):
    """Reports of the workers since the last read."""

    step: int
    loss: float
    steps_per_s: float
    workers: int
    points: list[Point]


class Progress:
    """Reports of a run's workers, kept on the driver's node, so that they outlive the workers.

    Points up to step `told` are left out: an earlier driver has them already, and steps may be repeated.
    """

    def __init__(self, starts: int, told: int = -1) -> None:
        actor = ray.remote(num_cpus=0)(Board).options(scheduling_strategy=cluster.this_node())
        self._actor = actor.remote(starts, told)

    def started(self, step: int, workers: int) -> str | None:
        """Report a start, from worker 0; return the reason to give up, if any.

        Reasons are an error for good in the last start, and too many starts from this step.
        """
        failed: str | None = ray.get(self._actor.started.remote(step, workers))
        return failed

    def stepped(self, step: int, loss: float, steps_per_s: float) -> None:
        self._actor.stepped.remote(step, loss, steps_per_s)

    def point(self, step: int, figures: Mapping[str, float]) -> None:
        self._actor.point.remote(step, dict(figures))

    def failed(self, error: str, for_good: bool) -> None:
        """Report an error; `for_good` if a new start would end the same way."""
        ray.get(self._actor.failed.remote(error, for_good))

    def read(self) -> Told:
        told: Told = ray.get(self._actor.read.remote())
        return told


class Board:
    def __init__(self, starts: int, told: int = -1) -> None:
        self._most = starts
        self._from, self._starts = -1, 0
        self._error, self._for_good = _UNTOLD, False
        self._step, self._loss, self._rate, self._workers = 0, math.nan, 0.0, 0
        self._points: list[Point] = []
        self._added = -math.inf
        self._next = told + 1

    def started(self, step: int, workers: int) -> str | None:
        self._starts = self._starts + 1 if step == self._from else 1
        self._from, self._step, self._workers = step, step, workers
        failed, self._error = self._error, _UNTOLD
        if self._for_good:
            return failed
        if self._starts > self._most:
            return f"{self._most} starts from step {step} made no new checkpoint: {failed}"
        return None

    def stepped(self, step: int, loss: float, steps_per_s: float) -> None:
        self._step, self._loss, self._rate = step, loss, steps_per_s
        if time.monotonic() - self._added >= _POINT_S:
            self._add(Point(step, {"loss": loss, "steps_per_s": steps_per_s, "workers": float(self._workers)}))
            self._added = time.monotonic()

    def point(self, step: int, figures: dict[str, float]) -> None:
        self._step = step
        self._add(Point(step, figures))

    def failed(self, error: str, for_good: bool) -> None:
        if (
            self._error == _UNTOLD or for_good
        ):  # the first failure: other workers then lose their connections to that one
            self._error, self._for_good = error, for_good
        self._workers = 0

    def read(self) -> Told:
        points, self._points = self._points, []
        return Told(self._step, self._loss, self._rate, self._workers, points)

    def _add(self, point: Point) -> None:
        if point.step >= self._next:  # repeated steps are not reported again
            self._points.append(point)
            self._next = point.step  # there may be more points at this step
