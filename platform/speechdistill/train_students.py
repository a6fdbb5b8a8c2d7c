"""Train students from label shards: each variant a run of its own, as many side by side as the cluster fits."""

import logging
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import ray

from speechdistill import cluster, cost, labeled, table
from speechdistill.batches import LabelRun, Mix
from speechdistill.labels import LabelTransform
from speechdistill.shards import RunError
from speechdistill.tracking import Tracking, run_id, tracking_uri
from speechdistill.watch import stop_on_sigterm

if TYPE_CHECKING:  # torch takes seconds to import, which `--help` does not need
    from speechdistill.recipes.distill import Distill
    from speechdistill.side_by_side import Run
    from speechdistill.student_files import Student
    from speechdistill.train import Job

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainStudents:
    """Train students on labelled shards and listeners' scores, on any number of workers.

    The same command goes on where it stopped; another configuration needs another --out. Each variant has its own
    folder OUT/NAME with the best student in OUT/NAME/best. Exit code 1 if any variant failed.
    """

    out: str
    """Folder of the runs, a local path or URL."""
    shards: tuple[str, ...] = ()
    """Folders of label runs, each with an optional weight (DIR=0.3)."""
    labeled: str | None = None
    """Clips that listeners scored: a clips.parquet with column mos, or a CSV with path and mos. Column split says
    which validate; without it one speaker, or clip, of twenty."""
    variants: str = "all"
    """Which students: all, or names such as v0,v3. Only v7 is the paper's published one."""
    labeled_percent: tuple[float, ...] = ()
    """Labeled clips in each batch, 0 to 100. Several, such as 0 10 20 40 80, train each variant with each. Default: the
    paper's 20 where --labeled is given, else 0."""
    labeled_only: bool = False
    """The paper's baseline: the same as --labeled-percent 100."""
    label_transform: str | None = None
    """JSON file (schema label_transform.v1) that maps each dataset's scores to one scale. Default: as they are."""
    init: str | None = None
    """A student to train further, such as OUT/v0/best or models:/NAME@champion; it decides the variant."""
    workers: str = "1"
    """Workers of each run: a number, or FEWEST:MOST for a run that grows and shrinks with the cluster."""
    cpus_per_worker: float = 1.0
    """CPUs, and threads, of each worker."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; 0.5, 0.25 or 0.125 for several runs on one. Default: 1 where the cluster has one, else 0."""
    grow_to: str | None = None
    """What a cluster that scales by itself may grow to, such as cpu=320,gpu=8. Default: the nodes it has now."""
    steps: int = 250_000
    """Updates."""
    learning_rate: float = 2e-5
    """AdamW's."""
    batch_size: int = 20
    """Samples in the global batch, whatever the number of workers."""
    crop_s: float = 7.68
    """Seconds of each sample that are trained on, at most 7.68; shorter is faster."""
    validate_every: int = 5_000
    """Steps between validations."""
    checkpoint_every_s: float = 300.0
    """Seconds between checkpoints: what a killed worker costs at most."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision."""
    compile: bool = False
    """Compile the network (torch.compile)."""
    seed: int = 0
    """Decides batches and initial weights."""


def run(config: TrainStudents) -> list[dict[str, Any]]:
    """Train what is not trained yet; a row per variant: its figures and `state`, done or failed.

    One failure does not stop the others. Raises `RunError`, `TableError` or `ValueError` where nothing can be
    trained.
    """
    from speechdistill import side_by_side
    from speechdistill.recipes import distill

    cluster.be_patient()
    config = _absolute(config)
    tracking_uri(config.out)
    recipes = _recipes(config)
    cluster.connect()
    stop_on_sigterm()
    cluster.check_shared(config.out)
    workers, gpus, at_once = _capacity(config, len(recipes))
    parent = Tracking(config.out, "train-students", "students", _plain(config))
    runs = [
        side_by_side.Run(
            name,
            distill.parameters(recipe.student),
            _job(config, name, recipe, workers, gpus),
            Tracking(f"{config.out}/{name}", "train-students", name, {**_plain(config), **_size(recipe)}, parent),
        )
        for name, recipe in recipes.items()
    ]
    try:
        side_by_side.train(runs, at_once)
    except BaseException as error:
        for tracking in [run.tracking for run in runs if run.state in ("waiting", "training")] + [parent]:
            tracking.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", patience_s=5)
        raise
    rows = [_row(run) for run in runs]
    parent.document({"students": rows}, "students.json")
    parent.end("FINISHED" if all(run.state == "done" for run in runs) else "FAILED")
    for run in runs:
        _log_model(run)
    return rows


def _absolute(config: TrainStudents) -> TrainStudents:
    percents = (100.0,) if config.labeled_only else config.labeled_percent or (20.0 if config.labeled else 0.0,)
    return replace(
        config,
        out=table.absolute(config.out),
        labeled=config.labeled and table.absolute(config.labeled),
        label_transform=config.label_transform and table.absolute(config.label_transform),
        labeled_percent=tuple(dict.fromkeys(percents)),
    )


def _recipes(config: TrainStudents) -> "dict[str, Distill]":
    """By name, checked: whatever is wrong with a source is told before the work."""
    from speechdistill.recipes import distill
    from speechdistill.students.conv_transformer import VARIANTS

    runs = [LabelRun(place) for place in config.shards]
    places = tuple(f"{run.out}={run.weight!r}" for run in runs)  # workers run in other folders
    mixes = [Mix(places, p, config.batch_size, config.crop_s, config.seed) for p in config.labeled_percent]
    transform = LabelTransform.read(config.label_transform)
    provenance: dict[str, Any] = {
        "shards": [_about(run) for run in runs],
        "label_transform": transform.to_json(),
        "git_commit": _git_commit(),
    }
    scored = None
    if config.labeled:
        scored, provenance["labeled"] = _scored(config.labeled, config.out)
    init = None
    if config.init:
        init, student = _initial(config.init, config.out)
        provenance["init"] = {"weights_sha256": student.weights_hash, **student.provenance}
        names = {"finetuned": student.network.config}
    else:
        wanted = list(VARIANTS) if config.variants == "all" else config.variants.split(",")
        names = {name.strip(): distill.student(name.strip()) for name in wanted}
    recipes = {
        name if len(mixes) == 1 else f"{name}-{mix.labeled_percent:g}": distill.Distill(
            size, mix, scored, config.label_transform, init, {**provenance, "variant": name}
        )
        for name, size in names.items()
        for mix in mixes
    }
    for recipe in list(recipes.values())[: len(mixes)]:
        recipe.make()
    return recipes


def _initial(address: str, out: str) -> "tuple[str, Student]":
    """The student to begin with, copied beside the runs, where all workers read it."""
    from speechdistill import registry, student_files

    with registry.student_folder(address) as folder:
        student = student_files.load(folder)
    copy = f"{out}/init-{student.weights_hash[:8]}"
    student_files.save(student.network, copy, student.provenance)
    return copy, student


def _scored(source: str, out: str) -> tuple[str, str]:
    """The labeled clips as a table beside the runs, which all workers read, and their fingerprint."""
    clips = labeled.manifest(source)
    fingerprint = table.fingerprint(clips.select(["clip_id", "dataset", "split", "speaker", "mos"]).to_pylist())
    path = f"{out}/labeled-{fingerprint[:8]}.parquet"
    table.publish(table.parquet_bytes(clips), path)
    return path, fingerprint


def _about(run: LabelRun) -> dict[str, Any]:
    known = {key: run.configuration.get(key) for key in ("recipe", "teacher")}
    return {"fingerprint": run.fingerprint, "weight": run.weight, **known}


def _job(config: TrainStudents, name: str, recipe: "Distill", workers: tuple[int, int], gpus: float) -> "Job":
    from speechdistill.loop import Training
    from speechdistill.train import Job

    training = Training(
        config.steps,
        config.learning_rate,
        validate_every=config.validate_every,
        checkpoint_every_s=config.checkpoint_every_s,
        dtype=config.dtype,
        compile=config.compile,
    )
    identity = {
        "job": "train-students",
        "variant": name,
        "student": asdict(recipe.student),
        "mix": {**asdict(recipe.mix), "shards": None},
        "data": {
            key: value for key, value in (recipe.provenance or {}).items() if key not in ("git_commit", "variant")
        },
        "training": {**asdict(training), "checkpoint_every_s": None, "compile": None},
    }
    return Job(recipe.make, training, f"{config.out}/{name}", identity, workers, config.cpus_per_worker, gpus)


def _size(recipe: "Distill") -> dict[str, Any]:
    return {**asdict(recipe.student), "segment_samples": recipe.mix.crop_samples}


def _plain(config: TrainStudents) -> dict[str, Any]:
    return {key: value for key, value in asdict(config).items() if value is not None}


def _capacity(config: TrainStudents, runs: int) -> tuple[tuple[int, int], float, int]:
    """(fewest, most) workers of a run, GPUs of each, and how many runs side by side."""
    fewest, most = _range(config.workers)
    now, later = ray.cluster_resources(), cost.amounts("--grow-to", config.grow_to)
    has_cpus, has_gpus = (max(now.get(unit.upper(), 0.0), later.get(unit, 0.0)) for unit in ("cpu", "gpu"))
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = 1.0 if has_gpus else 0.0
    if 0 < gpus < 1 and most > 1:
        raise RunError(f"--gpus-per-worker {gpus:g} is for one worker a run (NCCL wants a GPU each); give --workers 1")
    fits = int(has_cpus / config.cpus_per_worker + 1e-6)
    if gpus:
        fits = min(fits, int(has_gpus / gpus + 1e-6))
    if fits < fewest:
        raise RunError(
            f"a run of {fewest} workers with {config.cpus_per_worker:g} CPUs and {gpus:g} GPUs each does not fit the "
            f"cluster ({has_cpus:g} CPUs, {has_gpus:g} GPUs); lower --workers or --cpus-per-worker, or say with "
            "--grow-to what the cluster may grow to"
        )
    at_once = max(1, min(runs, fits // fewest))
    # A run reserves its most, so with several at once each may have its share only.
    return (fewest, max(fewest, min(most, fits // at_once) if at_once > 1 else most)), gpus, at_once


def _range(text: str) -> tuple[int, int]:
    fewest, _, most = text.partition(":")
    try:
        numbers = int(fewest), int(most or fewest)
    except ValueError:
        numbers = (0, 0)
    if not 1 <= numbers[0] <= numbers[1]:
        raise RunError(f"--workers {text!r}: a number from 1, or FEWEST:MOST such as 1:8")
    return numbers


def _log_model(run: "Run") -> None:
    """The best student as a model of its MLflow run; without MLflow it is told, and the next call tries again."""
    from speechdistill import registry

    if run.state != "done":
        return
    in_mlflow = run_id(run.job.out)
    try:
        if in_mlflow is None:
            raise registry.RegistryError("MLflow has not answered yet")
        registry.log_student(f"{run.job.out}/best", in_mlflow, tracking_uri(run.job.out))
    except (registry.RegistryError, table.TableError, table.StorageError) as error:
        _LOG.warning("the model of %s is not in MLflow (%s); the same command tries again", run.name, error)


def _row(run: "Run") -> dict[str, Any]:
    best = run.summary.get("best", {})
    return {
        "variant": run.name,
        "parameters": run.parameters,
        "state": run.state,
        "steps": run.summary.get("steps", run.told.step if run.told else 0),
        "train_s": run.train_s,
        "best_step": best.get("step"),
        "mse": best.get("mse"),
        "pcc": best.get("pcc"),
        "folder": f"{run.job.out}/best" if run.state == "done" else None,
        "run_id": run_id(run.job.out),
        "error": run.error or None,
    }


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # installed, or on a cluster
        return None
