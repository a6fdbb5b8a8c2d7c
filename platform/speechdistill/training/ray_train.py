"""Train one recipe with Ray Train: any number of workers, checkpoints, resumed by the same call.

The steps are `loop.py`; this file is what Ray Train needs around them. What the workers report is in `progress.py`.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
import ray
import torch

from speechdistill.engine import cluster, shards
from speechdistill.io import storage
from speechdistill.io.errors import AudioError, RunError, TableError, UnreadableError
from speechdistill.training.loop import DamagedStateError, Loop, NotFiniteError, read_state
from speechdistill.training.progress import Progress
from speechdistill.training.recipe import MSE, Best, Training, TrainingRecipe

_STATE = "state.pt"
_TELL_S = 0.5  # for a progress bar


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training run. `identity` determines the result and is kept in `OUT/run.json`; other fields do not affect it.

    `workers` is (fewest, most); each has `cpus` CPUs, and `gpus` GPUs; a fraction is only allowed for a single worker.
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


def fit(job: Job, progress: Progress) -> dict[str, Any]:
    """Train, or resume, and return the summary, `OUT/summary.json`. It is written last, beside the folder `OUT/best`.

    Raises `RunError` if the folder belongs to another configuration, the loss is not finite, or the workers fail
    repeatedly without a new checkpoint. Progress so far is kept.
    """
    shards.claim(job.out, job.identity)
    if summary := shards.completed(job.out):
        return summary
    result = trainer(job, progress).fit()
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
    shards.complete(job.out, summary)
    return summary


def trainer(job: Job, progress: Progress) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    class Trainer(TorchTrainer):  # type: ignore[misc]  # Ray has no types
        """Trainer for a local Ray, without the actor that removes the placement groups of dead drivers.

        That actor polls a dashboard every second, and a local Ray has none. If Ray renames the private method, the
        actor is back and the rest works.
        """

        def _create_default_callbacks(self) -> list[Any]:
            made: list[Any] = super()._create_default_callbacks()
            return [one for one in made if type(one).__name__ != "PlacementGroupCleanerCallback"]

    fewest, most = job.workers
    resources = {"CPU": job.cpus, **({"GPU": job.gpus} if job.gpus else {})}
    filesystem, path = _storage(job.out)
    return (Trainer if cluster.is_alone() else TorchTrainer)(
        work,
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
            failure_config=FailureConfig(max_failures=-1),  # `Progress` counts those without a new checkpoint
            # The best and, always, the last.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute=job.best.figure, checkpoint_score_order=job.best.direction
            ),
        ),
    )


def _storage(out: str) -> tuple[Any, str]:
    """Return a URL's file system for Ray Train, which would search for other credentials than the platform."""
    if "://" not in out:
        return None, out
    fs, path = storage.file_system(out)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)), path


def work(config: dict[str, Any]) -> dict[str, str]:
    """Run one worker. Ray Train retries after an exception; a run ends only if all workers return."""
    job, progress = config["job"], config["progress"]
    cluster.be_patient()
    # This logger is named after its file, ignores settings, and repeats the figures of MLflow and the progress line.
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
    """Save the network at a milestone in a folder of its own, by worker 0; `figures.json` is written last."""
    if rank == 0:
        loop.save(f"{job.out}/{name}")
        storage.publish_json({"step": loop.step, **figures}, f"{job.out}/{name}/figures.json")


def _told_by_first(value: str | None, world: int) -> str | None:
    values = [value]
    if world > 1:
        torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def _report(best: Best, loop: Loop, figures: Mapping[str, float], rank: int) -> None:
    """Report a checkpoint, written by worker 0 and uploaded by another thread."""
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
    """Steps per second of this start, and the times of the last report and checkpoint."""

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
