"""One recipe trained on Ray Train: any number of workers, checkpoints, resumed by the same call.

The steps are `loop.py`; this file is what Ray Train needs around them. What the workers tell on their way goes to an
actor (`Progress`), which the driver reads: Ray Train itself hands on only what comes with a checkpoint.
"""

import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.fs
import ray
import torch

from speechdistill.engine import cluster, shards
from speechdistill.io import storage
from speechdistill.io.errors import AudioError, RunError, TableError, UnreadableError
from speechdistill.training.loop import DamagedStateError, Loop, NotFiniteError, read_state
from speechdistill.training.recipe import MSE, Best, Training, TrainingRecipe

_STATE = "state.pt"
_TELL_S, _POINT_S = 0.5, 10.0  # for a progress bar, for a curve
_UNTOLD = "no error was told; a worker may have been killed"


@dataclass(frozen=True, kw_only=True)
class Job:
    """What to train, and where. `identity` decides the result and is kept in `OUT/run.json`; the rest says how.

    `workers` is (fewest, most); each has `cpus` CPUs, and `gpus` GPUs, where a fraction is for one worker only.
    """

    make: Callable[[], TrainingRecipe]
    training: Training
    out: str
    identity: Mapping[str, Any]
    best: Best = MSE
    workers: tuple[int, int] = (1, 1)
    cpus: float = 1.0
    gpus: float = 0.0
    resize_every_s: float = 60.0
    starts: int = 6  # without a new checkpoint in between, after which the run is given up


class Point(NamedTuple):
    """Figures at a step."""

    step: int
    figures: dict[str, float]


class Told(NamedTuple):
    """What the workers told since the last time."""

    step: int
    loss: float
    steps_per_s: float
    workers: int
    points: list[Point]


class Progress:
    """What the workers of a run tell: on the driver's node, so that it outlives them.

    Points up to step `told` are left out: an earlier driver has had them, and steps may be made again.
    """

    def __init__(self, starts: int, told: int = -1) -> None:
        actor = ray.remote(num_cpus=0)(_Progress).options(scheduling_strategy=cluster.this_node())
        self._actor = actor.remote(starts, told)

    def started(self, step: int, workers: int) -> str | None:
        """Told by worker 0; why to give up, where the last start or too many of them from this step say so."""
        failed: str | None = ray.get(self._actor.started.remote(step, workers))
        return failed

    def stepped(self, step: int, loss: float, steps_per_s: float) -> None:
        self._actor.stepped.remote(step, loss, steps_per_s)

    def point(self, step: int, figures: Mapping[str, float]) -> None:
        self._actor.point.remote(step, dict(figures))

    def failed(self, error: str, for_good: bool) -> None:
        """`for_good`: a new start would end the same way."""
        ray.get(self._actor.failed.remote(error, for_good))

    def read(self) -> Told:
        told: Told = ray.get(self._actor.read.remote())
        return told


class _Progress:
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
        if self._error == _UNTOLD or for_good:  # what fails first; the other workers then lose their connections to it
            self._error, self._for_good = error, for_good
        self._workers = 0

    def read(self) -> Told:
        points, self._points = self._points, []
        return Told(self._step, self._loss, self._rate, self._workers, points)

    def _add(self, point: Point) -> None:
        if point.step >= self._next:  # steps that are made again are not told again
            self._points.append(point)
            self._next = point.step  # of which there may be more


def fit(job: Job, progress: Progress) -> dict[str, Any]:
    """Train, or go on training, and return the summary: `OUT/summary.json`, written last beside the folder `OUT/best`.

    Raises `RunError` where the folder belongs to another configuration, the loss is not finite, or the workers fail
    again and again without a new checkpoint; progress so far is kept.
    """
    shards.claim(job.out, job.identity)
    if summary := storage.read_json(f"{job.out}/summary.json"):
        return dict(summary)
    result = _trainer(job, progress).fit()
    failure = (result.return_value or {}).get("failure")
    if failure:
        raise RunError(failure, f"progress so far is saved in {job.out}")
    choose = min if job.best.direction == "min" else max
    checkpoint, figures = choose(result.best_checkpoints, key=lambda pair: float(pair[1][job.best.figure]))
    with checkpoint.as_directory() as folder:
        for file in sorted(Path(folder).iterdir()):
            if file.name != _STATE and not file.name.startswith("."):
                storage.publish(file.read_bytes(), f"{job.out}/best/{file.name}")
    summary = {"steps": job.training.steps, "best": {k: v for k, v in figures.items() if k != "is_best"}}
    storage.publish_json(summary, f"{job.out}/summary.json")
    return summary


def _trainer(job: Job, progress: Progress) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
        """On a local Ray without the actor that removes the placement group of a driver that died: it asks a dashboard
        every second, and there is none, or another Ray's. Should Ray rename what is private here, it is there again.
        """

        def _create_default_callbacks(self) -> list[Any]:
            made: list[Any] = super()._create_default_callbacks()
            return [one for one in made if type(one).__name__ != "PlacementGroupCleanerCallback"]

    fewest, most = job.workers
    resources = {"CPU": job.cpus, **({"GPU": job.gpus} if job.gpus else {})}
    filesystem, path = _storage(job.out)
    return (Trainer if cluster.is_alone() else TorchTrainer)(
        _work,
        train_loop_config={"job": job, "progress": progress},
        torch_config=TorchConfig(backend="nccl" if job.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(fewest, most) if most > fewest else fewest,
            elastic_resize_monitor_interval_s=job.resize_every_s,
            use_gpu=bool(job.gpus),
            resources_per_worker=resources,
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=filesystem,
            logging_config=LoggingConfig(log_level="ERROR"),  # warnings are about Ray itself
            failure_config=FailureConfig(max_failures=-1),  # `Progress` counts those that bring nothing
            # The best and, always, the last.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=job.best.figure, checkpoint_score_order=job.best.direction
            ),
        ),
    )


def _storage(out: str) -> tuple[Any, str]:
    """A URL's file system for Ray Train, which would look for other credentials than the rest of the platform."""
    if "://" not in out:
        return None, out
    fs, path = storage.file_system(out)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def _work(config: dict[str, Any]) -> dict[str, str]:
    """What each worker runs. What is raised is tried again, and only what all workers return together ends a run."""
    job, progress = config["job"], config["progress"]
    cluster.be_patient()
    # This logger is named after its file, heeds no setting, and repeats what MLflow and the progress line have.
    reports = Path(ray.__file__).parent / "train" / "v2" / "_internal" / "execution" / "context.py"
    logging.getLogger(str(reports)).setLevel(logging.WARNING)
    try:
        return _trained(job, progress)
    except (NotFiniteError, DamagedStateError) as error:  # raised on all workers
        return {"failure": str(error)}
    except Exception as error:
        wrong_data = isinstance(error, (TableError, AudioError))
        for_good = wrong_data and not isinstance(error, UnreadableError)
        progress.failed(f"{type(error).__name__}: {error}", for_good)
        raise


def _trained(job: Job, progress: Progress) -> dict[str, str]:
    from ray.train import get_checkpoint, get_context
    from ray.train.torch import get_device, prepare_model

    torch.set_num_threads(max(1, round(job.cpus)))
    rank, world = get_context().get_world_rank(), get_context().get_world_size()
    state = None
    if checkpoint := get_checkpoint():
        with checkpoint.as_directory() as folder:
            state = read_state(f"{folder}/{_STATE}", job.out)
    step = state["step"] if state else 0
    if failure := _told_by_first(progress.started(step, world) if rank == 0 else None, world):
        return {"failure": failure}
    loop = Loop(job.make(), job.training, prepare_model, str(get_device()))
    if state:
        loop.load(state)
    pace = _Pace(loop.step)
    milestones = dict(job.training.milestones)
    if loop.step == 0 and 0 in milestones:
        _keep(job, loop, milestones[0], loop.validate(), rank)
    for step, loss, asked in loop.run(job.training.steps, lambda: pace.since_saved() > job.training.checkpoint_every_s):
        if rank == 0 and pace.tells(step):
            progress.stepped(step, loss, pace.steps_per_s)
        validates = step % job.training.validate_every == 0 or step == job.training.steps or step in milestones
        if validates or asked:
            figures = loop.validate() if validates else {}
            if rank == 0 and figures:
                progress.point(step, {f"validation/{key}": value for key, value in figures.items()})
            if step in milestones:
                _keep(job, loop, milestones[step], figures, rank)
            _report(job.best, loop, figures, rank)
            pace.saved()
    return {}


def _keep(job: Job, loop: Loop, name: str, figures: Mapping[str, float], rank: int) -> None:
    """What the network has become, written by worker 0 to a folder of its own; `figures.json` is written last."""
    if rank == 0:
        loop.save(f"{job.out}/{name}")
        storage.publish_json({"step": loop.step, **figures}, f"{job.out}/{name}/figures.json")


def _told_by_first(value: str | None, world: int) -> str | None:
    values = [value]
    if world > 1:
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _report(best: Best, loop: Loop, figures: Mapping[str, float], rank: int) -> None:
    """A checkpoint, written by worker 0 and taken to its place by another thread."""
    from ray.train import Checkpoint, CheckpointUploadMode, report

    checkpoint = None
    if rank == 0:
        folder = tempfile.mkdtemp(prefix="checkpoint-")  # Ray Train removes it
        torch.save(loop.state(), Path(folder) / _STATE)
        loop.save(folder)
        checkpoint = Checkpoint.from_directory(folder)
    metrics = {"step": loop.step, best.figure: best.worst, **figures}
    report(metrics, checkpoint, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)


class _Pace:
    """Steps per second of this start, and when to tell and to save."""

    def __init__(self, step: int) -> None:
        now = time.monotonic()
        self._saved, self._told, self._told_step = now, now, step
        self.steps_per_s = 0.0

    def since_saved(self) -> float:
        return time.monotonic() - self._saved

    def saved(self) -> None:
        self._saved = time.monotonic()

    def tells(self, step: int) -> bool:
        now = time.monotonic()
        if now - self._told < _TELL_S:
            return False
        rate = (step - self._told_step) / (now - self._told)
        self.steps_per_s = 0.9 * self.steps_per_s + 0.1 * rate if self.steps_per_s else rate
        self._told, self._told_step = now, step
        return True
