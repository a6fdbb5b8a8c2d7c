"""A training run that tests can stop at a step.

As a program: `python tests/small_training.py LABELS OUT MOST MARKS STEP`.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from torch import Tensor, nn

from speechdistill.engine import cluster
from speechdistill.io.errors import UserError
from speechdistill.training.batches import Mix
from speechdistill.training.lanes import Part
from speechdistill.training.progress import Board, Progress
from speechdistill.training.ray_train import Job, fit, work
from speechdistill.training.recipe import Around, Errors, Training
from speechdistill.training.recipes.distill import Distill, DistillRecipe, tiny
from speechdistill.training.side_by_side import Run

STEPS = 60


@dataclass(frozen=True)
class Stopped:
    """At update `step` the first worker to come there is killed, or, if the file `waits` is in `marks`, leaves the file
    `reached` and waits for the file `go`; once.
    """

    recipe: Distill
    marks: str
    step: int

    def __call__(self) -> DistillRecipe:
        return _Stopped(self)


class _Stopped(DistillRecipe):
    def __init__(self, stopped: Stopped) -> None:
        super().__init__(stopped.recipe)
        self._marks, self._left = Path(stopped.marks), stopped.step

    def errors(self, network: nn.Module, arrays: Mapping[str, Tensor], part: Part, around: Around) -> Errors:
        self._left -= 1
        if self._left == 0:
            self._stop()
        return super().errors(network, arrays, part, around)

    def _stop(self) -> None:
        try:
            (self._marks / "reached").touch(exist_ok=False)
        except FileExistsError:
            return
        if not (self._marks / "waits").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        pause = threading.Event()
        while not (self._marks / "go").exists():
            pause.wait(0.05)


def job(labels: str, out: str, most: int, marks: str, step: int) -> Job:
    """Checkpoints come twice a second, a validation, which takes longer than all steps, at the end."""
    recipe = Stopped(Distill(student=tiny(), mix=Mix(shards=(labels,), labeled_percent=0, crop_s=0.08)), marks, step)
    training = Training(steps=STEPS, learning_rate=1e-3, validate_every=STEPS, checkpoint_every_s=0.5, dtype="float64")
    return Job(
        make=recipe, training=training, out=out, identity={"seed": 0}, workers=(1, most), cpus=1.0, resize_every_s=2.0
    )


def train_here(runs: list[Run], at_once: int) -> None:
    """`side_by_side.train` without a worker: Ray Train's local mode, one run after another in this process."""
    for one in runs:
        progress: Any = Board(one.job.starts)
        try:
            one.summary, one.state = fit(one.job, progress), "done"
        except UserError as error:
            one.error, one.state = str(error), "failed"
        one.told = progress.read()
        one.tracking.end("FINISHED" if one.state == "done" else "FAILED")


class LocalTrainer:
    """What `ray_train.trainer` makes, in local mode, which knows the last checkpoint only."""

    def __init__(self, job: Job, progress: Progress) -> None:
        config = {"job": job, "progress": progress}
        self._trainer = TorchTrainer(work, train_loop_config=config, scaling_config=ScalingConfig(num_workers=0))

    def fit(self) -> Any:
        result = self._trainer.fit()
        result.best_checkpoints = [(result.checkpoint, result.metrics)]
        return result


if __name__ == "__main__":
    labels, out, most, marks, step = sys.argv[1:]
    cluster.connect()
    one = job(labels, out, int(most), marks, int(step))
    progress = Progress(one.starts)
    summary = fit(one, progress)
    print(json.dumps({**summary, "workers": progress.read().workers}))
