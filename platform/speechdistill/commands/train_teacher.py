"""Train a teacher: a quality head above a frozen speech encoder, on the clips of listening tests."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from speechdistill.commands import outputs, report
from speechdistill.commands.guarded import guarded
from speechdistill.engine.limits import Rejects
from speechdistill.engine.place import Place, grown
from speechdistill.engine.watch import stop_on_sigterm
from speechdistill.io import fingerprint, lease, storage
from speechdistill.io.errors import RunError
from speechdistill.io.options import flat
from speechdistill.tracking.run import Tracking
from speechdistill.training.options import Schedule, Updates

if TYPE_CHECKING:  # ray and torch take seconds to import, which `--help` does not need
    from speechdistill.training.launch import TrainedRun
    from speechdistill.training.ray_train import Job
    from speechdistill.training.recipes.teacher import TeacherTraining

NAME = "teacher"


@dataclass(frozen=True, kw_only=True)
class TrainTeacher:
    """Train a quality head above a frozen speech encoder on clips that listeners scored.

    The encoder's hidden states are computed once, into OUT/features; then the head is trained on them, with a scale
    for each dataset (bias-aware). OUT/teacher/best has the best head and label_transform.v1.json, which maps each
    dataset's scores to one scale for `train-students --label-transform`. The same command resumes; another
    configuration needs another --out. The defaults are the paper's.
    """

    out: str
    """Folder of the features and the training run, a local path or URL."""
    labeled: str
    """Clips that listeners scored: a clips.parquet of `ingest --corpus` with column mos, or a CSV with path and mos.
    Column split says which clips validate; without it one speaker, or clip, of twenty validates."""
    encoder: str | None = None
    """A speech encoder of transformers (XLS-R, wav2vec 2.0, HuBERT, WavLM): its folder, or hf://OWNER/NAME to
    download. Default: XLS-R 2B in the hub's cache."""
    layer: int = 10
    """Encoder layer whose hidden states feed the head. Later layers are not loaded."""
    plain: bool = False
    """One scale for all datasets, learned by the head alone."""
    features: str | None = None
    """Folder of the features, which heads on the same clips, encoder and layer may share. Default: OUT/features."""
    features_dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the encoder."""
    rejects: Rejects = Rejects()
    place: Place = Place()
    schedule: Schedule = Schedule(steps=72_000, validate_every=3_000)
    updates: Updates = Updates(learning_rate=1e-4, batch_size=12)


@guarded("progress so far is kept; the same command resumes")
def command(config: Annotated[tyro.conf.OmitArgPrefixes[TrainTeacher], tyro.conf.arg(name="")]) -> int:
    runs = run(config)
    print(report.trained(runs))
    return 0 if all(one.state == "done" for one in runs) else 1


def run(config: TrainTeacher) -> "list[TrainedRun]":
    """Compute the missing features, train, and return the result of the one run.

    Raises `UserError` if nothing can be trained; progress so far is kept.
    """
    from speechdistill.engine import cluster

    cluster.be_patient()
    config = _absolute(config)
    features_files = [f"{config.features}/{name}" for name in ("run.json", "shards/part", "manifest.parquet")]
    outputs.try_job(config.out, "train-teacher", f"{NAME}/run.json", *features_files)
    with lease.held(config.out, "train-teacher"), lease.held(str(config.features), "train-teacher"):
        return _trained(config)


def _trained(config: TrainTeacher) -> "list[TrainedRun]":
    from speechdistill.engine import cluster
    from speechdistill.labelling import features
    from speechdistill.models import parameters
    from speechdistill.models.networks import speech_encoder
    from speechdistill.training import launch
    from speechdistill.training.side_by_side import Run

    clips, clips_sha256 = launch.scored(config.labeled, config.out, features.scored_clips)
    encoder, sha256 = speech_encoder.load(str(config.encoder), config.layer)
    frozen = parameters.count(encoder)
    del encoder  # gigabytes
    cluster.connect()
    stop_on_sigterm()
    cluster.check_shared(config.out)
    workers, gpus, _ = launch.capacity(config.place, 1)  # an error is reported before any work
    totals = features.compute(_features(config, clips, sha256))
    if not totals.complete:
        raise RunError("the features are not complete", "rerun the command")
    recipe = _recipe(config, sha256, clips_sha256, clips)
    made = recipe.make()
    computed = made.batches.fingerprint  # rejected clips may have been computed since
    network: Any = made.network()  # the head, and the scales of the datasets, which scoring does not need
    size = parameters.count(network.head).above(frozen)._replace(trainable=parameters.count(network).trainable)
    job = _job(config, recipe, computed, workers, gpus)
    about = flat(config)
    parent = Tracking(config.out, "train-teacher", NAME, about)
    tracking = Tracking(job.out, "train-teacher", "plain" if config.plain else "bias-aware", about, parent)
    count = len(made.batches.validation_numbers(0, 1))
    run = Run(name=NAME, size=size, job=job, tracking=tracking, clips=count, scale="on the teacher's universal scale")
    return launch.train(parent, NAME, [run], at_once=1)


def _absolute(config: TrainTeacher) -> TrainTeacher:
    from speechdistill.models.networks import speech_encoder

    if config.encoder is None:  # the default is not downloaded unasked: 8.7 GB
        speech_encoder.located(speech_encoder.XLSR_2B, only_here=True)
    out = storage.absolute(config.out)
    return replace(
        config,
        out=out,
        labeled=storage.absolute(config.labeled),
        encoder=storage.absolute(config.encoder or speech_encoder.XLSR_2B),
        features=storage.absolute(config.features or f"{out}/features"),
    )


def _features(config: TrainTeacher, clips: str, sha256: str) -> Any:
    from speechdistill.labelling.features import Features

    return Features(
        clips=clips,
        out=str(config.features),
        encoder=str(config.encoder),
        layer=config.layer,
        sha256=sha256,
        dtype=config.features_dtype,
        rejects=config.rejects,
        grow_to=grown(config.place.grow_to),
    )


def _recipe(config: TrainTeacher, sha256: str, clips_sha256: str, clips: str) -> "TeacherTraining":
    from speechdistill.training import launch
    from speechdistill.training.recipes.teacher import TeacherTraining

    heard = launch.heard_clips(clips, trains=True)
    provenance = {"labeled": clips_sha256, "git_commit": launch.git_commit(), "bias_aware": not config.plain, **heard}
    return TeacherTraining(
        features=str(config.features),
        encoder=str(config.encoder),
        encoder_sha256=sha256,
        layer=config.layer,
        bias_aware=not config.plain,
        batch_size=config.updates.batch_size,
        seed=config.updates.seed,
        provenance=provenance,
    )


def _job(
    config: TrainTeacher, recipe: "TeacherTraining", features: str, workers: tuple[int, int], gpus: float
) -> "Job":
    from speechdistill.training.ray_train import Job
    from speechdistill.training.recipe import Training

    training = Training(
        steps=config.schedule.steps,
        learning_rate=config.updates.learning_rate,
        validate_every=config.schedule.validate_every,
        checkpoint_every_s=config.updates.checkpoint_every_s,
        dtype=config.updates.dtype,
    )
    identity = {
        "job": "train-teacher",
        "recipe": {**fingerprint.identity(recipe), "features": None, "encoder": None, "provenance": None},
        "features": features,
        "training": training.identity(),
    }
    return Job(
        make=recipe.make,
        training=training,
        out=f"{config.out}/{NAME}",
        identity=identity,
        workers=workers,
        cpus=config.place.cpus_per_worker,
        gpus=gpus,
    )
