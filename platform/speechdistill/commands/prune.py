"""Prune a trained teacher and fine-tune it, with a checkpoint at each of several sizes."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from speechdistill.commands import outputs, report
from speechdistill.commands.guarded import guarded
from speechdistill.commands.results import Kept
from speechdistill.engine.place import Place
from speechdistill.engine.watch import stop_on_sigterm
from speechdistill.io import audio, fingerprint, lease, storage
from speechdistill.io.errors import RunError, UserError
from speechdistill.io.options import flat
from speechdistill.tracking.run import Tracking, run_id, tracking_uri
from speechdistill.training.options import Crops, Updates

if TYPE_CHECKING:  # ray and torch take seconds to import, which `--help` does not need
    from speechdistill.models.windowed import WindowScorer
    from speechdistill.training.pruning import Pruning
    from speechdistill.training.ray_train import Job
    from speechdistill.training.recipes.pruned import Pruned

NAME = "pruned"
_LOG = logging.getLogger(__name__)
_TIMINGS = 5


@dataclass(frozen=True, kw_only=True)
class Removal:
    """The weights that are removed, and the times of removal."""

    criterion: Literal["importance", "magnitude", "structured", "random"] = "importance"
    """Order of removal: weights of little importance or magnitude first, or at random. structured removes attention
    heads and feed-forward neurons of little importance, which makes checkpoints smaller and faster."""
    until: float = 0.29
    """Share that remains at the end."""
    keep: tuple[float, ...] = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.29, 0.2, 0.1)
    """Remaining shares at which a checkpoint is kept, down to --until. The last checkpoint is always kept."""
    share: float = 0.005
    """Share that each removal takes."""
    of: Literal["original", "remaining"] = "original"
    """Base of --share: with the defaults, 71% are removed after 142 removals (original) or 247 (remaining)."""
    every: int = 30
    """Updates before each removal, and after the last one."""


@dataclass(frozen=True, kw_only=True)
class Prune:
    """Prune a trained teacher's encoder step by step, fine-tuning it between (Distill-MOS, section IV-C).

    OUT/pruned/remaining-50 is the teacher with half of its weights left (structured: half of its heads and neurons).
    Other commands take each such folder as a teacher. The same command resumes; another configuration needs another
    --out. The defaults are the paper's. A table at the end shows size, cost and validation of each checkpoint.
    """

    model: str
    """The teacher: the folder of its checkpoint (OUT/teacher/best of train-teacher), or models:/NAME@champion."""
    labeled: str
    """Clips that listeners scored: a clips.parquet of `ingest --corpus` with column mos, or a CSV with path and mos.
    Column split says which clips validate; without it one speaker, or clip, of twenty validates."""
    out: str
    """Folder of the run, a local path or URL."""
    encoder: str | None = None
    """Folder or hf://OWNER/NAME of the teacher's encoder, if not where it was in training."""
    removal: Removal = Removal()
    shards: tuple[str, ...] = ()
    """Fine-tune on teachers' labels too: folders of label runs, each with an optional weight (DIR=0.3)."""
    labeled_percent: float = 100.0
    """Listeners' clips in each batch; 0 fine-tunes on --shards alone (the paper: no gain)."""
    register: str | None = None
    """Name in MLflow's registry; each kept checkpoint becomes a version of it."""
    place: Place = Place()
    crops: Crops = Crops()
    updates: Updates = Updates(checkpoint_every_s=1800.0)


@guarded("progress so far is kept; the same command resumes from the last checkpoint")
def command(config: Annotated[tyro.conf.OmitArgPrefixes[Prune], tyro.conf.arg(name="")]) -> int:
    checkpoints, clips = run(config)
    print(report.pruned(checkpoints, clips))
    return 0


def run(config: Prune) -> tuple[list[Kept], int]:
    """Prune, or resume; return the kept checkpoints, the unpruned teacher first, and the number of validation clips.

    Raises `UserError` with the cause and the fix; progress so far is kept.
    """
    from speechdistill.engine import cluster

    cluster.be_patient()
    config = _absolute(config)
    outputs.try_job(config.out, "prune", f"{NAME}/run.json")
    with lease.held(config.out, "prune"):
        return _pruned(config)


def _pruned(config: Prune) -> tuple[list[Kept], int]:
    from speechdistill.engine import cluster
    from speechdistill.models import parameters
    from speechdistill.training import launch
    from speechdistill.training.side_by_side import Run

    recipe, identity = _recipe(config)
    for line in report.held_out(identity["shards"]):
        print(line, flush=True)
    made = recipe.make()
    network = made.network()
    made.companions(network)  # an error is reported before any work
    size = parameters.count(network)
    cluster.connect()
    stop_on_sigterm()
    cluster.check_shared(config.out)
    workers, gpus, _ = launch.capacity(config.place, 1)
    job = _job(config, recipe, identity, workers, gpus)
    about = flat(config)
    parent = Tracking(config.out, "prune", NAME, about)
    tracking = Tracking(job.out, "prune", config.removal.criterion, about, parent)
    (trained,) = launch.train(parent, NAME, [Run(name=NAME, size=size, job=job, tracking=tracking)], at_once=1)
    if trained.state != "done":
        raise RunError(str(trained.error), f"progress so far is saved in {job.out}")
    kept = _kept(job.out, [name for _, name in job.training.milestones])
    return _logged(config, job.out, kept), launch.num_validation(recipe.labeled)


def _absolute(config: Prune) -> Prune:
    encoder = config.encoder and storage.absolute(config.encoder)
    return replace(config, out=storage.absolute(config.out), labeled=storage.absolute(config.labeled), encoder=encoder)


def _recipe(config: Prune) -> "tuple[Pruned, dict[str, Any]]":
    """Return the checked recipe and the run's identity: errors of the sources are reported before any work."""
    from speechdistill.io import checkpoint
    from speechdistill.tracking import registry
    from speechdistill.training import launch
    from speechdistill.training.batches import Mix
    from speechdistill.training.recipes.pruned import Pruned

    labels, held, shards = launch.label_runs(config.shards, [f"{config.out}/{NAME}"], validate=False)
    if labels and config.labeled_percent == 100:
        reason = "--shards are unused: 100% of each batch are labeled clips"
        raise UserError(reason, "give --labeled-percent below 100")
    mix = Mix(
        shards=tuple(f"{run.out}={run.weight!r}" for run in labels),  # workers run in other folders
        labeled_percent=config.labeled_percent,
        batch_size=config.updates.batch_size,
        crop_s=config.crops.crop_s,
        seed=config.updates.seed,
    )
    pruning = _pruning(config)
    clips, clips_sha256 = launch.scored(config.labeled, config.out)
    with registry.student_folder(config.model) as folder:
        files = checkpoint.read(folder)
        if not files.has_encoder:
            raise RunError(f"{config.model} is a student", "give a teacher: only speech encoders can be pruned")
        teacher = f"{config.out}/unpruned-{files.weights_hash[:8]}"  # read by all workers
        checkpoint.copy(folder, teacher)
    sources: dict[str, Any] = {
        "teacher": files.weights_hash,
        "labeled": clips_sha256,
        "shards": shards,
    }
    heard = launch.heard_clips(clips, trains=config.labeled_percent > 0)
    known = {**sources, **heard, "init": files.provenance, "git_commit": launch.git_commit()}
    recipe = Pruned(
        teacher=teacher,
        encoder=config.encoder,
        mix=mix,
        labeled=clips,
        pruning=pruning,
        provenance=known,
        held_out=held,
    )
    identity = {
        "job": "prune",
        "mix": {**fingerprint.identity(mix), "shards": None},
        "pruning": fingerprint.identity(pruning),
        **sources,
    }
    return recipe, identity


def _pruning(config: Prune) -> "Pruning":
    from speechdistill.training.pruning import Pruning

    schedule = {name: value for name, value in vars(config.removal).items() if name != "keep"}
    return Pruning(**schedule, seed=config.updates.seed)


def _job(config: Prune, recipe: "Pruned", identity: dict[str, Any], workers: tuple[int, int], gpus: float) -> "Job":
    from speechdistill.training.ray_train import Job
    from speechdistill.training.recipe import Training

    steps = recipe.pruning.updates
    kept = sorted(
        {share for share in config.removal.keep if share > config.removal.until} | {config.removal.until}, reverse=True
    )
    # One removal may reach several shares: the smallest names the checkpoint.
    updates = {replace(recipe.pruning, until=share).updates: share for share in kept}
    training = Training(
        steps=steps,
        learning_rate=config.updates.learning_rate,
        validate_every=steps,
        checkpoint_every_s=config.updates.checkpoint_every_s,
        dtype=config.updates.dtype,
        milestones=((0, "remaining-100"), *((step, f"remaining-{100 * share:g}") for step, share in updates.items())),
    )
    identity = {**identity, "training": training.identity()}
    return Job(
        make=recipe.make,
        training=training,
        out=f"{config.out}/{NAME}",
        identity=identity,
        workers=workers,
        cpus=config.place.cpus_per_worker,
        gpus=gpus,
    )


def _kept(out: str, names: Sequence[str]) -> list[Kept]:
    """Measure sizes and costs of the kept checkpoints."""
    from speechdistill.io import checkpoint
    from speechdistill.models import architectures
    from speechdistill.models.device import torch_device
    from speechdistill.models.options import TeacherOptions

    devices = ["cpu", "cuda"] if torch_device(None).type == "cuda" else ["cpu"]
    options = {device: TeacherOptions(device=device) for device in devices}
    first = {device: architectures.scorer(f"{out}/{names[0]}", options[device]) for device in devices}
    kept = []
    for name in names:
        folder = f"{out}/{name}"
        figures: Any = storage.read_json(f"{folder}/figures.json")
        scorers = {device: architectures.scorer(folder, options[device]) for device in devices}
        costs = {device: _cost(first[device], scorers[device], device) for device in devices}
        size = scorers["cpu"].parameters()
        assert size  # a network of torch
        kept.append(
            Kept(
                name=name,
                remaining=figures["remaining"],
                nonzero=size.nonzero,
                parameters=size.stored,
                size_mb=checkpoint.size(folder) / 1e6,
                cpu_s=costs["cpu"],
                cuda_s=costs.get("cuda"),
                mse=figures["mse"],
                pcc=figures.get("pcc"),
                folder=folder,
            )
        )
    return kept


def _cost(unpruned: "WindowScorer", model: "WindowScorer", device: str) -> float:
    """Return the time of scoring 7.68 s as a share of the unpruned model's, measured in turns; CPU time on a CPU."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    wave = np.random.default_rng(0).standard_normal(round(audio.SEGMENT_S * audio.SAMPLE_RATE)).astype(np.float32)
    ratios = []
    for _ in range(_TIMINGS + 1):
        seconds = []
        for one in (unpruned, model):
            start = clock()
            one.label([wave])
            seconds.append(clock() - start)
        ratios.append(seconds[1] / seconds[0])
    return float(np.median(ratios[1:]))


def _logged(config: Prune, out: str, kept: Sequence[Kept]) -> list[Kept]:
    """Log the checkpoints as models of the MLflow run, and return them with their versions.

    A failure is reported, and the next call tries again.
    """
    from speechdistill.tracking import registry

    logged = list(kept)
    in_mlflow, uri = run_id(out), tracking_uri(out)
    try:
        if in_mlflow is None:
            raise registry.RegistryError("MLflow has not answered yet", "the models are sent once it does")
        for i, one in enumerate(kept):
            model = registry.log_student(one.folder, in_mlflow, uri)
            if config.register:
                version = registry.Registry(uri).register(config.register, model).number
                logged[i] = replace(one, version=version)
        registry.Registry(uri).document(in_mlflow, {NAME: [one.to_json() for one in logged]}, f"{NAME}.json")
    except UserError as error:
        _LOG.warning("not all checkpoints are in MLflow (%s); the same command tries again", error)
    return logged
