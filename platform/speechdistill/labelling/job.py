"""The labelling job: its samples, its teacher, and its stages on the engine."""

from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from speechdistill.data import degradation_recipes, manifest_path
from speechdistill.data.clips import Clips
from speechdistill.data.degradation_recipes import RecipeName
from speechdistill.data.plan import DegradationRecipe, Plans
from speechdistill.engine import place, pools, shards
from speechdistill.engine.limits import Limits
from speechdistill.engine.pools import Pools
from speechdistill.engine.stages import Stage
from speechdistill.io import fingerprint
from speechdistill.io.audio import MIN_DURATION_S, SEGMENT_S
from speechdistill.io.errors import RunError
from speechdistill.io.options import at_least
from speechdistill.labelling import figures
from speechdistill.labelling.samples import DEGRADED, SCHEMA, TAUGHT, Degrade, Enhance, libraries
from speechdistill.labelling.teach import Teach
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions

if TYPE_CHECKING:  # imports ray, which the options of a command do not need
    from speechdistill.engine import flow

_NOTHING = pa.schema([])  # the stage adds no columns
_CALLS = 3  # concurrent batches of a teacher on a GPU: one in the network, two being decoded


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of a run."""

    recipe: RecipeName = "weights_free"
    """Degradation recipe. weights_free: the paper's degradations that need no trained weights. voip: rooms, noise,
    clipping, changing levels, lost packets, telephone codecs. as_is: recordings as they are, whole files in segments.
    paper: all degradations of the paper; their networks need weights, which `speechdistill recipe show paper` lists."""
    assets: dict[str, str] = field(default_factory=dict)
    """Weights or texts of the recipe's components: NAME and a path or URL (also hf://OWNER/MODEL), such as nsnet2 FILE.
    May be repeated. With texts, espeak-ng speaks 15% of the samples of weights_free."""
    without: tuple[str, ...] = ()
    """Component to leave out, such as denoisers.demucs; its probability goes to 'none'. May be repeated."""
    lpcnet: bool = False
    """Recipe paper: use libcodec2's LPCNet codec for half of the vocoders; it is harsher than the paper's LPCNet."""
    num_samples: int | None = None
    """Total number of samples; may be raised later. Default: every speech clip once (as_is: every segment)."""
    seed: int = 0
    """Seed of the clips, segments and degradations of all samples."""
    segment_s: float = SEGMENT_S
    """Length of a sample in seconds; shorter clips stay whole."""
    snr_sigma_db: float = 10.0
    """Standard deviation of the SNR around 10 dB (the paper's "variance 10 dB" read literally is 3.162)."""

    def __post_init__(self) -> None:
        at_least(self, num_samples=1, seed=0, segment_s=MIN_DURATION_S, snr_sigma_db=0)

    def chosen(self) -> DegradationRecipe:
        """Return the recipe with its assets; raises `UserError` if an asset is missing."""
        recipe = degradation_recipes.chosen(self.recipe, self.without, self.assets, self.lpcnet)
        return degradation_recipes.with_assets(
            replace(recipe, segment_s=self.segment_s, snr_sigma_db=self.snr_sigma_db)
        )


@dataclass(frozen=True, kw_only=True)
class Labeller:
    """The teacher that labels the samples."""

    teacher: str = "distillmos"
    """Teacher: distillmos, xlsr, dnsmos_p808, dnsmos_p835, squim, nisqa, utmos, a teacher trained here (the folder of
    its checkpoint or models:/NAME@champion), pesq_oracle, which compares with the clean segment, or a weighted mean of
    teachers such as ensemble:NAME=0.7,NAME=0.3."""
    weights: str | None = None
    """File with the teacher's weights; for xlsr, and for a head trained here, the encoder's folder or hf://OWNER/NAME.
    Default: the released weights; for a head, the encoder that it was trained with."""
    head: str | None = None
    """Teacher xlsr: file of the head above the encoder. Default: the original head from the wheel xls-r-sqa."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the teacher's network."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Contents of the shards."""

    audio_format: Literal["flac", "pcm16"] = "flac"
    """Format of the audio in the shards."""
    reference: bool = False
    """Keep the clean segment beside each degraded one."""
    rows_per_part: int = 64
    """Samples per shard file. A killed driver loses its unfinished files."""

    def __post_init__(self) -> None:
        at_least(self, rows_per_part=1)


@dataclass(frozen=True, kw_only=True)
class TeacherId:
    """The teacher in the identity of a run."""

    name: str
    sha256: str
    dtype: str
    intrusive: bool = field(default=False, metadata=fingerprint.ADDED)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A checked job, before anything is written. `clips` is the manifest, `clips_sha256` the hash of its bytes."""

    samples: Samples
    labeller: Labeller
    stored: Stored
    recipe: DegradationRecipe
    num_samples: int
    teacher: TeacherId
    clips: str
    clips_sha256: str

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that affect samples and labels. Runs with equal identities make equal rows."""
        return {
            "job": "pseudolabel",
            # The sources of assets are included, since they are in the plans.
            "recipe": {
                **asdict(self.recipe),
                "assets": {name: asset._asdict() for name, asset in self.recipe.assets.items()},
            },
            "seed": self.samples.seed,
            "clips_sha256": self.clips_sha256,
            "teacher": fingerprint.identity(self.teacher),
            "audio_format": self.stored.audio_format,
            "reference": self.stored.reference,
            "rows_per_part": self.stored.rows_per_part,
            "libraries": libraries(self.recipe),
        }


def prepared(clips: str, samples: Samples, labeller: Labeller, stored: Stored) -> Prepared:
    """Check a job on a manifest; raises `UserError` if it is impossible."""
    recipe = samples.chosen()
    manifest_path.check(clips)
    plans = Plans(recipe, Clips.read(clips), samples.seed)
    num_samples = len(plans) if samples.num_samples is None else samples.num_samples
    if recipe.whole_files and num_samples > len(plans):
        reason = f"--num-samples {num_samples} does not fit: recipe {recipe.name} has {len(plans)} samples here"
        raise RunError(reason, f"give 1 to {len(plans)}")
    # On the CPU: the driver needs only name and hash of the teacher, and must not occupy a GPU during the run.
    options = TeacherOptions(weights=labeller.weights, head=labeller.head, device="cpu", dtype=labeller.dtype)
    teacher = load_teacher(labeller.teacher, options)
    if teacher.intrusive:
        _check_has_clean(labeller.teacher, recipe)
    return Prepared(
        samples=samples,
        labeller=labeller,
        stored=stored,
        recipe=recipe,
        num_samples=num_samples,
        teacher=TeacherId(
            name=teacher.name,
            sha256=teacher.weights_hash,
            dtype=labeller.dtype,
            intrusive=teacher.intrusive,
        ),
        clips=clips,
        clips_sha256=fingerprint.of_file(clips),
    )


def _check_has_clean(teacher: str, recipe: DegradationRecipe) -> None:
    """Raise `RunError` if an intrusive teacher would have to score samples that have no clean reference."""
    made = [name for name in recipe.components if name.startswith("generated.")]
    if made:
        left_out = " ".join(f"--without {name}" for name in made)
        reason = f"teacher {teacher} compares with clean speech; generated samples have none"
        raise RunError(reason, f"give {left_out}")
    if not recipe.components:
        reason = f"teacher {teacher} compares with clean speech; recipe {recipe.name} degrades nothing"
        raise RunError(reason, "give another teacher, or a recipe that degrades")


def flow_of(job: Prepared, out: str, limits: Limits, wanted: Pools) -> "flow.Flow":
    """Return the job for the engine, with output in the folder `out`."""
    from speechdistill.engine import flow

    layout = shards.Layout(
        out=out,
        schema=SCHEMA,
        id_column="sample_id",
        num_ids=job.num_samples,
        rows_per_part=job.stored.rows_per_part,
        totals=figures.of_part,
    )
    return flow.Flow(
        layout=layout,
        identity=job.identity,
        stages=partial(stages, job, wanted),
        limits=limits,
        grow_to=place.grown(wanted.grow_to),
    )


def stages(job: Prepared, wanted: Pools, cpus: float, gpus: float) -> tuple[Stage, ...]:
    """Return the stages of the job, with pools for a cluster of `cpus` and `gpus`."""
    passes = degradation_recipes.network_passes(job.recipe)
    if gpus and passes and wanted.teach_gpus is not None:
        raise RunError(
            "--teach-gpus cannot be given with a recipe that has networks, which share the GPUs with the teacher",
            "leave it out",
        )
    sizes = pools.sized(wanted, passes, cpus, gpus)
    degrade = _degrade_stage(job)
    listed = [replace(degrade, pool=sizes.degrade)]
    for number in range(1, passes + 1):
        enhance = partial(Enhance, job.recipe)
        listed += [
            Stage(
                name=f"network {number}",
                make=enhance,
                adds=_NOTHING,
                pool=sizes.network,
                batch_rows=16,
                isolated=True,
            ),
            replace(degrade, name=f"degrade {number + 1}", adds=_NOTHING, pool=sizes.later),
        ]
    return (*listed, _teach_stage(job, sizes.teach, wanted.batch_s))


def _degrade_stage(job: Prepared) -> Stage:
    reference = job.stored.reference or job.teacher.intrusive
    make = partial(
        Degrade, job.clips, job.recipe, job.samples.seed, job.stored.audio_format, reference, libraries(job.recipe)
    )
    return Stage(name="degrade", make=make, adds=DEGRADED, batch_rows=16, isolated=True, memory_gb=4)


def _teach_stage(job: Prepared, pool: pools.Pool, batch_s: float | None) -> Stage:
    by, segment_s = job.labeller, job.recipe.segment_s
    batch_s = batch_s or segment_s * (64 if pool.num_gpus else 8)
    # On a CPU one segment at a time is fastest; a GPU needs the whole batch.
    at_once_s = batch_s if pool.num_gpus else None
    return Stage(
        name="teach",
        make=partial(
            Teach, by.teacher, by.weights, by.head, by.dtype, at_once_s, job.teacher.sha256, job.stored.reference
        ),
        adds=TAUGHT,
        pool=pool,
        batch_rows=max(1, int(batch_s / segment_s + 1e-6)),
        isolated=True,
        calls=_CALLS if pool.num_gpus else 1,
    )
