"""Train students from label shards: each variant a run of its own, as many side by side as the cluster fits."""

import os
import shlex
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from speechdistill.commands import outputs, report
from speechdistill.commands.guarded import guarded
from speechdistill.data.label_scale import LabelTransform
from speechdistill.engine.place import Place
from speechdistill.engine.watch import stop_on_sigterm
from speechdistill.io import checkpoint, fingerprint, lease, storage
from speechdistill.io.options import flat
from speechdistill.tracking.run import Tracking, run_id
from speechdistill.training.options import Crops, Schedule, Updates

if TYPE_CHECKING:  # ray and torch take seconds to import, which `--help` does not need
    from speechdistill.engine.finished_run import LabelRun
    from speechdistill.models.networks.conv_transformer import ConvTransformerConfig
    from speechdistill.models.student import Student
    from speechdistill.training.launch import TrainedRun
    from speechdistill.training.ray_train import Job
    from speechdistill.training.recipes.distill import Distill


@dataclass(frozen=True, kw_only=True)
class TrainStudents:
    """Train students on labelled shards and listeners' scores, on any number of workers.

    The same command resumes; another configuration needs another --out. Each variant has its own folder OUT/NAME with
    the best student in OUT/NAME/best. Exit code 1 if any variant failed.
    """

    out: str
    """Folder of the runs, a local path or URL."""
    shards: tuple[str, ...] = ()
    """Folders of label runs, each with an optional weight (DIR=0.3)."""
    labeled: str | None = None
    """Clips that listeners scored: a clips.parquet with column mos, or a CSV with path and mos. Column split says
    which clips validate; without it one speaker, or clip, of twenty validates."""
    variants: str = "all"
    """Students to train: all, or names such as v0,v3. The paper has published only v7."""
    labeled_percent: tuple[float, ...] = ()
    """Labeled clips in each batch, 0 to 100. Several values, such as 0 10 20 40 80, train each variant with each value.
    Default: the paper's 20 if --labeled is given, else 0."""
    labeled_only: bool = False
    """The paper's baseline: the same as --labeled-percent 100."""
    label_transform: str | None = None
    """JSON file (schema label_transform.v1) that maps each dataset's scores to one scale. Default: no mapping."""
    init: str | None = None
    """A student to train further, such as OUT/v0/best or models:/NAME@champion. --variants does not apply."""
    place: Place = Place()
    schedule: Schedule = Schedule()
    crops: Crops = Crops()
    updates: Updates = Updates()
    compile: bool = False
    """Compile the network (torch.compile)."""


@guarded("progress so far is kept; the same command resumes from the last checkpoints")
def command(config: Annotated[tyro.conf.OmitArgPrefixes[TrainStudents], tyro.conf.arg(name="")]) -> int:
    runs = run(config)
    print(report.trained(runs))
    if any(one.state == "done" for one in runs):
        print(next_command(config.out))
    return 0 if all(one.state == "done" for one in runs) else 1


def next_command(out: str) -> str:
    """Return the command that promotes the best student of a folder, with the id of the folder's MLflow run."""
    out = storage.absolute(out)
    parent = run_id(out)
    student = f"best-of:{parent}" if parent else out
    tracking = "" if os.environ.get("MLFLOW_TRACKING_URI") or not parent else f" --tracking {shlex.quote(out)}"
    return f"next: speechdistill promote --run {shlex.quote(student)} --eval CLIPS{tracking}"


def run(config: TrainStudents) -> "list[TrainedRun]":
    """Train the variants that are not trained yet, and return the results of all of them.

    One failure does not stop the others. Raises `UserError` if nothing can be trained.
    """
    from speechdistill.engine import cluster

    cluster.be_patient()
    config = _absolute(config)
    outputs.try_job(config.out, "train-students", "labeled")
    with lease.held(config.out, "train-students"):
        return _trained(config)


def _trained(config: TrainStudents) -> "list[TrainedRun]":
    from speechdistill.engine import cluster
    from speechdistill.models import parameters
    from speechdistill.training import launch
    from speechdistill.training.side_by_side import Run

    recipes = _recipes(config)
    for line in report.held_out((next(iter(recipes.values())).provenance or {})["shards"]):
        print(line, flush=True)
    cluster.connect()
    stop_on_sigterm()
    cluster.check_shared(config.out)
    workers, gpus, at_once = launch.capacity(config.place, len(recipes))
    parent = Tracking(config.out, "train-students", "students", flat(config))
    runs = [
        Run(
            name=name,
            size=parameters.of_student(recipe.student),
            job=_job(config, name, recipe, workers, gpus),
            tracking=Tracking(
                f"{config.out}/{name}", "train-students", name, {**flat(config), **_size(recipe)}, parent
            ),
            clips=_num_validation(recipe),
        )
        for name, recipe in recipes.items()
    ]
    return launch.train(parent, "students", runs, at_once)


def _absolute(config: TrainStudents) -> TrainStudents:
    percents = (100.0,) if config.labeled_only else config.labeled_percent or (20.0 if config.labeled else 0.0,)
    return replace(
        config,
        out=storage.absolute(config.out),
        labeled=config.labeled and storage.absolute(config.labeled),
        label_transform=config.label_transform and storage.absolute(config.label_transform),
        labeled_percent=tuple(dict.fromkeys(percents)),
    )


def _recipes(config: TrainStudents) -> "dict[str, Distill]":
    """Return checked recipes by name: errors of the sources are reported before any work."""
    from speechdistill.training import launch
    from speechdistill.training.batches import Mix
    from speechdistill.training.recipes.distill import Distill

    transform = LabelTransform.read(config.label_transform)
    provenance: dict[str, Any] = {"label_transform": transform.to_json(), "git_commit": launch.git_commit()}
    scored = None
    if config.labeled:
        scored, provenance["labeled"] = launch.scored(config.labeled, config.out)
    init, sizes = _sizes(config, provenance)
    percents = config.labeled_percent
    names = {(size, p): size if len(percents) == 1 else f"{size}-{p:g}" for size in sizes for p in percents}
    outs = [f"{config.out}/{name}" for name in names.values()]
    runs, held, shards = launch.label_runs(
        config.shards, outs, validate=not scored or not launch.num_validation(scored)
    )
    places = tuple(f"{run.out}={run.weight!r}" for run in runs)  # workers run in other folders
    known = [{**about, **_labelled_by(run)} for run, about in zip(runs, shards, strict=True)]
    recipes = {}
    for (size, percent), name in names.items():
        mix = Mix(
            shards=places,
            labeled_percent=percent,
            batch_size=config.updates.batch_size,
            crop_s=config.crops.crop_s,
            seed=config.updates.seed,
        )
        used = {**provenance, **_used(percent, known, scored), "variant": size}
        recipes[name] = Distill(
            student=sizes[size],
            mix=mix,
            labeled=scored,
            transform=config.label_transform,
            init=init,
            provenance=used,
            held_out=held,
        )
    for recipe in list(recipes.values())[: len(percents)]:
        recipe.make()
    return recipes


def _sizes(config: TrainStudents, provenance: dict[str, Any]) -> "tuple[str | None, dict[str, ConvTransformerConfig]]":
    """Return the folder of the student to begin with, if any, and the students by name."""
    from speechdistill.models.networks.conv_transformer import VARIANTS
    from speechdistill.training.recipes import distill

    if config.init:
        init, student = _initial(config.init, config.out)
        provenance["init"] = {"weights_sha256": student.weights_hash, **student.provenance}
        return init, {"finetuned": student.network.config}
    wanted = list(VARIANTS) if config.variants == "all" else config.variants.split(",")
    return None, {name.strip(): distill.student(name.strip()) for name in wanted}


def _used(percent: float, shards: list[dict[str, Any]], scored: str | None) -> dict[str, Any]:
    """Return the provenance of the data: label runs (none with listeners' scores alone) and scored clips."""
    from speechdistill.training import launch

    clips = launch.heard_clips(scored, trains=percent > 0) if scored else {}
    return {"labeled_percent": percent, "shards": shards if percent < 100 else [], **clips}


def _initial(address: str, out: str) -> "tuple[str, Student]":
    """Copy the student to begin with beside the runs, for all workers; return its folder and the student."""
    from speechdistill.models.student import load_student, save_student
    from speechdistill.tracking import registry

    with registry.student_folder(address) as folder:
        student = load_student(folder)
    copy = f"{out}/init-{student.weights_hash[:8]}"
    save_student(student.network, copy, student.provenance)
    return copy, student


def _labelled_by(run: "LabelRun") -> dict[str, Any]:
    return {key: run.configuration.get(key) for key in ("recipe", "teacher")}


def _job(config: TrainStudents, name: str, recipe: "Distill", workers: tuple[int, int], gpus: float) -> "Job":
    from speechdistill.training.ray_train import Job
    from speechdistill.training.recipe import Training

    training = Training(
        steps=config.schedule.steps,
        learning_rate=config.updates.learning_rate,
        validate_every=config.schedule.validate_every,
        checkpoint_every_s=config.updates.checkpoint_every_s,
        dtype=config.updates.dtype,
        compile=config.compile,
    )
    identity = {
        "job": "train-students",
        "variant": name,
        "student": fingerprint.identity(recipe.student),
        "mix": {**fingerprint.identity(recipe.mix), "shards": None},
        "data": {
            key: value
            for key, value in checkpoint.brief(recipe.provenance or {}).items()
            if key not in ("git_commit", "variant")
        },
        "training": training.identity(),
    }
    return Job(
        make=recipe.make,
        training=training,
        out=f"{config.out}/{name}",
        identity=identity,
        workers=workers,
        cpus=config.place.cpus_per_worker,
        gpus=gpus,
    )


def _num_validation(recipe: "Distill") -> int:
    """Return the number of clips that validate: scored ones, or held-out samples of the shards."""
    from speechdistill.training import launch

    count = launch.num_validation(recipe.labeled) if recipe.labeled else 0
    return count or sum(len(held.validation) for held in recipe.held_out or ())


def _size(recipe: "Distill") -> dict[str, Any]:
    return {**fingerprint.identity(recipe.student), "segment_samples": recipe.mix.crop_samples}
