"""Parts that commands which train share: their share of the cluster, their MLflow runs, the results of their runs."""

import logging
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray

from speechdistill.data import heard, scored_clips
from speechdistill.engine import held_out
from speechdistill.engine.finished_run import LabelRun
from speechdistill.engine.held_out import HeldOut
from speechdistill.engine.place import Place, grown
from speechdistill.io import checkpoint, fingerprint, storage, table
from speechdistill.io.errors import RunError, UserError
from speechdistill.tracking import registry
from speechdistill.tracking.run import Tracking, ended_as, run_id, tracking_uri
from speechdistill.training import side_by_side
from speechdistill.training.side_by_side import Run

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainedRun:
    """The result of one run: sizes, the figures of its best checkpoint on `clips` validation clips, its places.

    `scale` says on which scale `mse` and `pcc` are. Figures and `folder` are None for a run that failed, `error` is
    None for one that did not.
    """

    variant: str
    parameters: int
    trainable: int
    state: str
    steps: int
    train_s: float
    best_step: int | None
    mse: float | None
    pcc: float | None
    folder: str | None
    run_id: str | None
    error: str | None
    clips: int
    scale: str

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("clips", "scale")}


def train(parent: Tracking, title: str, runs: Sequence[Run], at_once: int) -> list[TrainedRun]:
    """Train the runs below their parent's MLflow run and return their results. One failure does not stop the others."""
    try:
        side_by_side.train(list(runs), at_once)
    except BaseException as error:
        for tracking in [run.tracking for run in runs if run.state in ("waiting", "training")] + [parent]:
            tracking.end(ended_as(type(error)), patience_s=5)
        raise
    results = [_result(run) for run in runs]
    parent.document({title: [result.to_json() for result in results]}, f"{title}.json")
    parent.end("FINISHED" if all(run.state == "done" for run in runs) else "FAILED")
    for run in runs:
        _log_model(run)
    return results


def capacity(place: Place, runs: int) -> tuple[tuple[int, int], float, int]:
    """Return (fewest, most) workers of a run, GPUs of each worker, and the number of runs side by side."""
    fewest, most = place.range
    now = (ray.cluster_resources().get(unit, 0.0) for unit in ("CPU", "GPU"))
    has_cpus, has_gpus = map(max, now, grown(place.grow_to))
    cpus, gpus = place.cpus_per_worker, place.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if has_gpus else 0.0
    if 0 < gpus < 1 and most > 1:
        reason = f"--gpus-per-worker {gpus:g} is for one worker a run (NCCL needs a GPU each)"
        raise RunError(reason, "give --workers 1")
    fits = int(has_cpus / cpus + 1e-6)
    if gpus:
        fits = min(fits, int(has_gpus / gpus + 1e-6))
    if fits < fewest:
        raise RunError(
            f"a run of {fewest} workers with {cpus:g} CPUs and {gpus:g} GPUs each does not fit the "
            f"cluster ({has_cpus:g} CPUs, {has_gpus:g} GPUs)",
            "lower --workers or --cpus-per-worker, or give --grow-to, the size that the cluster may grow to",
        )
    at_once = max(1, min(runs, fits // fewest))
    # A run reserves its largest size, so several at once get a share each.
    return (fewest, max(fewest, min(most, fits // at_once) if at_once > 1 else most)), gpus, at_once


def scored(source: str, out: str, prepare: Callable[[Any], Any] = lambda clips: clips) -> tuple[str, str]:
    """Write scored clips as a table beside the runs, for all workers; return its path and fingerprint."""
    clips = prepare(scored_clips.manifest(source))
    digest = fingerprint.of(clips.select(["clip_id", "dataset", "split", "speaker", "mos"]).to_pylist())
    path = f"{out}/labeled-{digest[:8]}.parquet"
    storage.publish(table.parquet_bytes(clips), path)
    return path, digest


def heard_clips(table_of_clips: str, trains: bool) -> dict[str, Any]:
    """Return a model's provenance: the clips of `scored` that validate it and, if it `trains` on them, train it."""
    train, validation = scored_clips.split(table.read(table_of_clips, "clip.v1"))
    return {checkpoint.CLIPS: heard.record(train if trains else None, validation)}


def num_validation(table_of_clips: str) -> int:
    """Return the number of clips of `scored` that validate."""
    return len(scored_clips.split(table.read(table_of_clips, "clip.v1"))[1])


def label_runs(
    places: Sequence[str], outs: Sequence[str], validate: bool
) -> tuple[list[LabelRun], tuple[HeldOut, ...], list[dict[str, Any]]]:
    """Return finished label runs, the samples held out of each, and the record of both in a provenance.

    If an earlier version began a run in one of the folders `outs`, its rule applies to all: whole row groups
    validate (`validate`), and a clip may be on both sides.
    """
    runs = [LabelRun(place) for place in places]
    _check_each_once(runs)
    if any(map(_is_earlier, outs)):
        _LOG.warning("a run that an earlier version began is resumed: clips of its held-out samples also train")
        return runs, tuple(held_out.by_row_groups(run, validate) for run in runs), [held_out.about(run) for run in runs]
    held = held_out.held_out(runs)
    return runs, held, [held_out.about(*pair) for pair in zip(runs, held, strict=True)]


def _check_each_once(runs: Sequence[LabelRun]) -> None:
    """Raise `UserError` for a label run that is given twice, perhaps as a copy: each sample would count twice."""
    known: dict[str, str] = {}
    for run in runs:
        other = known.setdefault(fingerprint.of(run.configuration), run.out)
        if other is not run.out:
            same = "twice" if other == run.out else f"and {other}, which is the same label run"
            raise UserError(f"--shards {run.out} {same}", f"give it once, with a weight such as {run.out}=2")


def _is_earlier(out: str) -> bool:
    known = (storage.read_json(f"{out}/run.json") or {}).get("configuration", {})
    shards = known.get("data", known).get("shards") or []
    return any("held_out" not in one for one in shards)


def git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # installed, or on a cluster
        return None


def _log_model(run: Run) -> None:
    """Log the best network as a model of its MLflow run; a failure is reported, and the next call tries again."""
    if run.state != "done":
        return
    in_mlflow = run_id(run.job.out)
    try:
        if in_mlflow is None:
            raise registry.RegistryError("MLflow has not answered yet", "the model is sent once it does")
        registry.log_student(f"{run.job.out}/best", in_mlflow, tracking_uri(run.job.out))
    except UserError as error:
        _LOG.warning("the model of %s is not in MLflow (%s); the same command tries again", run.name, error)


def _result(run: Run) -> TrainedRun:
    best = run.summary.get("best", {})
    return TrainedRun(
        variant=run.name,
        parameters=run.size.stored,
        trainable=run.size.trainable,
        state=run.state,
        steps=run.summary.get("steps", run.told.step if run.told else 0),
        train_s=run.train_s,
        best_step=best.get("step"),
        mse=best.get("universal_mse", best.get("mse")),  # of a teacher: on the scale of its scores
        pcc=best.get("pcc"),
        folder=f"{run.job.out}/best" if run.state == "done" else None,
        run_id=run_id(run.job.out),
        error=run.error or None,
        clips=run.clips,
        scale=run.scale,
    )
