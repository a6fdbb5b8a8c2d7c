"""The main job: plan -> degrade (CPU actors) -> teach (teacher actors) -> label shards, on the engine."""

import hashlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal

import pyarrow as pa
import tyro

from speechdistill.commands import outputs, report
from speechdistill.commands.guarded import guarded
from speechdistill.data import degradation_recipes, manifest_path, plan
from speechdistill.data.clips import Clips, check_each_once, share
from speechdistill.data.degradation_recipes import RecipeName
from speechdistill.data.plan import Plans, Recipe
from speechdistill.engine import cluster, cost, flow, pools, shards
from speechdistill.engine.isolate import Worker
from speechdistill.io import fingerprint, lease, storage
from speechdistill.io.audio import MIN_DURATION_S
from speechdistill.io.errors import RunError
from speechdistill.labelling import figures
from speechdistill.labelling.samples import DEGRADED, SCHEMA, TAUGHT, Degrade, Enhance, Teach, libraries
from speechdistill.models.load import load_teacher
from speechdistill.tracking.run import MODEL_ADDRESSES, Tracking

_LOG = logging.getLogger(__name__)
_FILES = ("run.json", "clips.parquet", "shards/part", "rejects/rejects.parquet", "manifest.parquet", "summary.json")
_NOTHING = pa.schema([])  # these stages fill columns that are there
_CALLS = 3  # batches of a teacher on a GPU: one computes, two are decoded


@dataclass(frozen=True)
class Pseudolabel:
    """Degrade speech by a recipe and label it with a teacher, into Parquet shards.

    The same command resumes a run that was stopped or killed; another configuration needs another --out.
    """

    clips: str
    """The manifest that the ingest job wrote (clips.parquet)."""
    out: str
    """Folder of this run, a local path or URL."""
    recipe: RecipeName = "weights_free"
    """weights_free: the paper's degradations that need no trained weights. voip: rooms, noise, clipping, changing
    levels, lost packets, telephone codecs. as_is: recordings as they are, whole files in segments. paper: the paper's
    degradations, whose networks need their weights: `speechdistill recipe show paper` lists them."""
    assets: dict[str, str] = field(default_factory=dict)
    """Weights or texts of the recipe's components, NAME and a path or URL (hf://OWNER/MODEL too), such as nsnet2 FILE;
    may be repeated. With texts, espeak-ng speaks 15% of the samples of weights_free."""
    without: tuple[str, ...] = ()
    """A component to leave out, such as denoisers.demucs; its probability goes to 'none'. May be repeated."""
    lpcnet: bool = False
    """Recipe paper: half of the vocoders are libcodec2's LPCNet codec, harsher than the LPCNet of the paper."""
    num_samples: int | None = None
    """Samples to make in all; may grow later. Default: every speech clip once (as_is: every segment)."""
    seed: int = 0
    """Decides clips, segments and degradations of all samples."""
    segment_s: float = plan.SEGMENT_S
    """Length of a sample in seconds; shorter clips stay whole."""
    snr_sigma_db: float = 10.0
    """Standard deviation of the SNR around 10 dB (the paper's "variance 10 dB" read literally is 3.162)."""
    teacher: str = "distillmos"
    """Which teacher labels: distillmos, xlsr, dnsmos_p808, dnsmos_p835, squim, nisqa, utmos, one that was trained here
    (the folder of its checkpoint or models:/NAME@champion), pesq_oracle, which compares with the clean segment, or
    ensemble:NAME=0.7,NAME=0.3, their weighted mean."""
    weights: str | None = None
    """The teacher's weights: a file; of xlsr, and of a head that was trained here, the encoder's folder or
    hf://OWNER/NAME. Default: the released ones; of a head, where its encoder was in training."""
    head: str | None = None
    """Of teacher xlsr, the file of the head above the encoder. Default: the original one from the wheel xls-r-sqa."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the teacher's network."""
    audio_format: Literal["flac", "pcm16"] = "flac"
    """How audio is stored in the shards."""
    reference: bool = False
    """Keep the clean segment beside each degraded one."""
    max_reject_share: float = 0.05
    """Stop when more than this share of the samples had to be rejected."""
    retry_rejected: bool = False
    """Make the parts with rejects again, after their cause was mended."""
    rows_per_part: int = 64
    """Samples per shard file; a killed driver loses the parts that are on their way."""
    degrade_actors: int | None = None
    """CPU actors that degrade. Default: what fits the cluster."""
    network_actors: int | None = None
    """Actors that run the recipe's networks, each all of them. Default: one per GPU, or per CPU where there is none."""
    teach_actors: int | None = None
    """Actors that run the teacher. Default: one per GPU, or per CPU where there is none."""
    teach_gpus: float | None = None
    """GPUs per teacher actor, such as 0.5. Default: 1 where the cluster has a GPU, shared equally with a recipe's
    networks, else 0."""
    batch_s: float | None = None
    """Seconds of audio that a teacher actor takes at once. Default: 8 segments, on a GPU 64."""
    grow_to: str | None = None
    """What a cluster that scales by itself may grow to, such as cpu=320,gpu=8: the pools are sized for it. Default:
    the nodes it has now."""
    max_hours: float | None = None
    """Stop cleanly after so many hours; the same command goes on later."""
    dry_run: bool = False
    """Write nothing: label 200 samples of the run, and print what all of it would take."""
    price: str | None = None
    """With --dry-run: money for an hour of each, such as cpu=0.05,gpu=2.5."""


@guarded("what is labelled is kept, and the same command goes on from there")
def command(config: Annotated[tyro.conf.UseAppendAction[Pseudolabel], tyro.conf.arg(name="")]) -> int:
    if config.dry_run:
        print(report.estimate(dry_run(config), config.price))
    else:
        print(report.labels(run(config), config.out))
    return 0


def run(config: Pseudolabel) -> dict[str, Any]:
    """Run or resume the job and return its summary, which is also `summary.json`, written last.

    Where `max_hours` ended it early, `complete` is false and no file says so yet. Raises `UserError`
    with the cause and the fix; what was labelled is kept.
    """
    config, recipe, num_samples, identity = _prepared(config)
    with lease.held(config.out, "pseudolabel"):
        return _labelled(config, recipe, num_samples, identity)


def _labelled(config: Pseudolabel, recipe: Recipe, num_samples: int, identity: dict[str, Any]) -> dict[str, Any]:
    if shards.configuration(config.out) is None:
        check_each_once(config.clips)
    shards.claim(config.out, identity)
    clips = _keep_manifest(config, identity["clips_sha256"])
    config = _keep_teacher(config)
    there = shards.listed(config.out)
    # A smaller number than before keeps what is there.
    num_samples = max([num_samples, *(k * config.rows_per_part + count for k, count in there.items())])
    _tell_made_again(config, there, num_samples)
    session = figures.Session()
    tracking = Tracking(config.out, "pseudolabel", recipe.name, _parameters(config, identity))
    job = replace(
        _flow(config, recipe, num_samples, identity, clips),
        on_part=session.add,
        report=lambda now: tracking.metrics(figures.live(now), step=int(now["done"])),
    )
    try:
        totals = flow.run(job)
        complete = totals.complete
        if not complete:
            session.count(totals.done - sum(there.values()))
        summary = {**figures.summary(config.out, totals, session), **_about(config, identity)}
        earlier = complete and storage.read_json(f"{config.out}/summary.json")
        if complete and (session.samples or not earlier):  # otherwise it was complete, and is left as it is
            storage.publish_json(summary, f"{config.out}/summary.json")
            tracking.figure(figures.histogram(summary), "scores.png")
            tracking.document(summary, "summary.json")
        if session.samples or not earlier:
            numbers = {key: value for key, value in summary.items() if isinstance(value, (int, float))}
            tracking.metrics(numbers, step=summary["num_samples"])
    except BaseException as error:
        tracking.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracking.end("FINISHED" if complete else "KILLED")
    return {**summary, "complete": complete, "wanted": num_samples}


def _tell_made_again(config: Pseudolabel, there: Mapping[int, int], num_samples: int) -> None:
    """Say which samples are labelled a second time: a part that is to have more is written again as a whole."""
    for k, count in there.items():
        first = k * config.rows_per_part
        if count < min(config.rows_per_part, num_samples - first):
            text = "samples %d to %d are made again, as before: they share a file of %d (--rows-per-part) with new ones"
            _LOG.warning(text, first, first + count - 1, config.rows_per_part)


def dry_run(config: Pseudolabel) -> cost.Estimate:
    """Label 200 samples of the run, write nothing, and tell what all of it takes; raises what `run` does."""
    config, recipe, num_samples, identity = _prepared(config)
    cluster.connect()
    cluster.check_seen(config.clips)
    trial = flow.trial(_flow(config, recipe, num_samples, identity, config.clips))
    return cost.estimate(trial, num_samples, cost.amounts("--price", config.price))


def _prepared(config: Pseudolabel) -> tuple[Pseudolabel, Recipe, int, dict[str, Any]]:
    """The configuration with absolute paths, its recipe, number of samples and identity: all checked, none written."""
    _validate(config)
    cluster.be_patient()
    weights, head = (path and storage.absolute(path) for path in (config.weights, config.head))
    clips, out = storage.absolute(config.clips), storage.absolute(config.out)
    if not config.dry_run:
        outputs.try_job(out, "pseudolabel", *_FILES)
    config = replace(config, clips=clips, out=out, weights=weights, head=head)
    recipe = degradation_recipes.chosen(config.recipe, config.without, config.assets, config.lpcnet)
    recipe = replace(recipe, segment_s=config.segment_s, snr_sigma_db=config.snr_sigma_db)
    recipe = degradation_recipes.with_assets(recipe)  # one that is missing is told before any work
    manifest_path.check(config.clips)
    plans = Plans(recipe, Clips.read(config.clips), config.seed)
    num_samples = len(plans) if config.num_samples is None else config.num_samples
    if num_samples < 1 or (recipe.whole_files and num_samples > len(plans)):
        reason = f"--num-samples {num_samples} does not fit: recipe {recipe.name} has {len(plans)} samples here"
        raise RunError(reason, f"give 1 to {len(plans)}" if recipe.whole_files else "give at least 1")
    identity = _identity(config, recipe)
    if identity["teacher"].get("intrusive"):
        _check_has_clean(config, recipe)
    return config, recipe, num_samples, identity


def _check_has_clean(config: Pseudolabel, recipe: Recipe) -> None:
    """Raise `RunError` for a recipe of which an intrusive teacher would judge samples that have no clean original."""
    made = [name for name in recipe.components if name.startswith("generated.")]
    if made:
        left_out = " ".join(f"--without {name}" for name in made)
        raise RunError(
            f"teacher {config.teacher} compares with clean speech; generated samples have none", f"give {left_out}"
        )
    if not recipe.components:
        reason = f"teacher {config.teacher} compares with clean speech; recipe {recipe.name} degrades nothing"
        raise RunError(reason, "give another teacher, or a recipe that degrades")


def _flow(config: Pseudolabel, recipe: Recipe, num_samples: int, identity: dict[str, Any], clips: str) -> flow.Flow:
    grow_to = cost.amounts("--grow-to", config.grow_to)
    reference = config.reference or identity["teacher"].get("intrusive", False)
    degrade = partial(Degrade, clips, recipe, config.seed, config.audio_format, reference, identity["libraries"])
    return flow.Flow(
        shards.Layout(config.out, SCHEMA, "sample_id", num_samples, config.rows_per_part, figures.of_part),
        identity,
        partial(_stages, config, recipe, degrade, identity["teacher"]["sha256"]),
        config.max_reject_share,
        config.retry_rejected,
        config.max_hours,
        (grow_to.get("cpu", 0.0), grow_to.get("gpu", 0.0)),
    )


def _validate(config: Pseudolabel) -> None:
    """Raise `RunError` for a number that cannot be meant, before anything is written."""
    smallest = {
        "num_samples": 1,
        "seed": 0,
        "segment_s": MIN_DURATION_S,
        "snr_sigma_db": 0,
        "max_reject_share": 0,
        "rows_per_part": 1,
        "degrade_actors": 1,
        "network_actors": 1,
        "teach_actors": 1,
        "teach_gpus": 0,
        "batch_s": MIN_DURATION_S,
        "max_hours": 0,
    }
    for name, least in smallest.items():
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise RunError(f"--{name.replace('_', '-')} is {value}", f"it must be at least {least}")
    cost.amounts("--grow-to", config.grow_to)
    cost.amounts("--price", config.price)
    if config.price and not config.dry_run:
        raise RunError("--price is for an estimate", "give --dry-run with it")


def _keep_manifest(config: Pseudolabel, sha256: str) -> str:
    """Copy the manifest into the run, as it is and as the workers map it, and return the latter's address.

    An ingest job may replace the original meanwhile.
    """
    copy = f"{config.out}/clips.parquet"
    fs, path = storage.file_system(copy)
    with storage.access(copy):
        is_there = fs.exists(path)
    if is_there and fingerprint.of_file(copy) != sha256:
        _LOG.warning("%s was changed since the run was started; it is copied from %s again", copy, config.clips)
        is_there = False
    if not is_there:
        with storage.access(config.clips), storage.opened(config.clips) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != sha256:
            raise RunError(f"{config.clips} changed just now", "rerun the command when its ingest has ended")
        storage.publish(data, copy)
    return share(copy, config.out, sha256)


def _keep_teacher(config: Pseudolabel) -> Pseudolabel:
    """Copy a teacher that is in MLflow into the run, where the workers read it: they may not know the MLflow, and its
    alias may move meanwhile.
    """
    if not config.teacher.startswith(MODEL_ADDRESSES):
        return config
    from speechdistill.io import checkpoint
    from speechdistill.tracking import registry

    copy = f"{config.out}/teacher"
    with registry.student_folder(config.teacher) as folder:
        checkpoint.copy(folder, copy)
    return replace(config, teacher=copy)


def _identity(config: Pseudolabel, recipe: Recipe) -> dict[str, Any]:
    # On the CPU: the driver only wants its name and hash, and must not hold a GPU for the run.
    teacher = load_teacher(config.teacher, config.weights, "cpu", config.dtype, head=config.head).teacher
    intrusive = {"intrusive": True} if teacher.intrusive else {}  # earlier runs have no such word, and go on
    return {
        "job": "pseudolabel",
        # With the places of its assets, which stand in the plans.
        "recipe": {**asdict(recipe), "assets": {name: asset._asdict() for name, asset in recipe.assets.items()}},
        "seed": config.seed,
        "clips_sha256": fingerprint.of_file(config.clips),
        "teacher": {"name": teacher.name, "sha256": teacher.weights_hash, "dtype": config.dtype, **intrusive},
        "audio_format": config.audio_format,
        "reference": config.reference,
        "rows_per_part": config.rows_per_part,
        "libraries": libraries(recipe),
    }


def _stages(
    config: Pseudolabel, recipe: Recipe, degrade: Callable[[], Worker], teacher_sha256: str, cpus: float, gpus: float
) -> tuple[flow.Stage, ...]:
    """The pools for a cluster."""
    passes = degradation_recipes.network_passes(recipe)
    if gpus and passes and config.teach_gpus is not None:
        raise RunError(
            "--teach-gpus cannot be given with a recipe that has networks: they and the teacher share the GPUs equally",
            "leave it out",
        )
    wanted = pools.Wanted(config.degrade_actors, config.network_actors, config.teach_actors, config.teach_gpus)
    sizes = pools.sized(wanted, passes, cpus, gpus)
    batch_s = config.batch_s or recipe.segment_s * (64 if sizes.heavy_gpus else 8)
    rows = max(1, int(batch_s / recipe.segment_s + 1e-6))
    # On a CPU the teacher runs one segment at a time, which is fastest there; a GPU wants the whole batch.
    model = (config.teacher, config.weights, config.head, config.dtype, batch_s if sizes.heavy_gpus else None)
    heavy = sizes.heavy_cpus, sizes.heavy_gpus
    first, later = ((actors, sizes.degrade_cpus, 0, 16, True, 4) for actors in (sizes.degrade, sizes.later))
    stages = [flow.Stage("degrade", degrade, DEGRADED, *first)]
    for number in range(1, passes + 1):
        enhance = partial(Enhance, recipe)
        stages.append(flow.Stage(f"network {number}", enhance, _NOTHING, sizes.network, *heavy, 16, True))
        stages.append(flow.Stage(f"degrade {number + 1}", degrade, _NOTHING, *later))
    teach = partial(Teach, *model, teacher_sha256, config.reference)
    calls = _CALLS if sizes.heavy_gpus else 1
    return (*stages, flow.Stage("teach", teach, TAUGHT, sizes.teach, *heavy, rows, isolated=True, calls=calls))


def _about(config: Pseudolabel, identity: Mapping[str, Any]) -> dict[str, Any]:
    """What stands in the summary beside the figures."""
    return {
        "recipe": config.recipe,
        "teacher": config.teacher,
        "seed": config.seed,
        "fingerprint": fingerprint.of(identity),
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _parameters(config: Pseudolabel, identity: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **asdict(config),
        "clips_sha256": identity["clips_sha256"],
        "teacher_sha256": identity["teacher"]["sha256"],
    }
