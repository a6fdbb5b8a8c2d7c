"""The main job: plan -> degrade (CPU actors) -> teach (teacher actors) -> label shards, on the engine."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from speechdistill.commands import outputs, report
from speechdistill.commands.guarded import guarded
from speechdistill.commands.results import LabelSummary
from speechdistill.data.clips import check_each_once, share
from speechdistill.engine import place, shards
from speechdistill.engine.limits import Limits
from speechdistill.engine.pools import Pools
from speechdistill.io import fingerprint, lease, storage
from speechdistill.io.errors import RunError
from speechdistill.io.options import OptionError, flat
from speechdistill.labelling import figures, job
from speechdistill.labelling.job import Labeller, Prepared, Samples, Stored
from speechdistill.tracking.run import MODEL_ADDRESSES, Tracking

if TYPE_CHECKING:  # ray takes seconds to import, which `--help` does not need
    from speechdistill.engine.cost import Estimate

_LOG = logging.getLogger(__name__)
_FILES = ("run.json", "clips.parquet", "shards/part", "rejects/rejects.parquet", "manifest.parquet", "summary.json")


@dataclass(frozen=True, kw_only=True)
class Pseudolabel:
    """Degrade speech by a recipe and label it with a teacher, into Parquet shards.

    The same command resumes; another configuration needs another --out.
    """

    clips: str
    """The manifest that the ingest job wrote (clips.parquet)."""
    out: str
    """Folder of this run, a local path or URL."""
    samples: Samples = Samples()
    labeller: Labeller = Labeller()
    stored: Stored = Stored()
    limits: Limits = Limits()
    pools: Pools = Pools()
    dry_run: bool = False
    """Label 200 samples of the run, write nothing, and print an estimate for the whole run."""
    price: str | None = None
    """With --dry-run: the price of an hour, such as cpu=0.05,gpu=2.5."""

    def __post_init__(self) -> None:
        place.amounts("--price", self.price)
        if self.price and not self.dry_run:
            raise OptionError("--price is for an estimate", "add --dry-run")


@guarded("progress so far is kept; the same command resumes")
def command(
    config: Annotated[tyro.conf.OmitArgPrefixes[tyro.conf.UseAppendAction[Pseudolabel]], tyro.conf.arg(name="")],
) -> int:
    if config.dry_run:
        print(report.estimate(dry_run(config), config.price))
    else:
        print(report.labels(run(config), config.out))
    return 0


def run(config: Pseudolabel) -> LabelSummary:
    """Run or resume the job and return its summary, which is also `summary.json`, written last.

    If `max_hours` ends the job early, `complete` is false and `summary.json` is not written. Raises `UserError` with
    the cause and the fix; progress so far is kept.
    """
    from speechdistill.engine import cluster

    out = storage.absolute(config.out)
    cluster.be_patient()
    outputs.try_job(out, "pseudolabel", *_FILES)
    prepared = _prepared(config)
    with lease.held(out, "pseudolabel"):
        return _labelled(replace(config, out=out), prepared)


def dry_run(config: Pseudolabel) -> "Estimate":
    """Label 200 samples of the run, write nothing, and return an estimate for the run; raises the errors of `run`."""
    from speechdistill.engine import cluster, cost, flow

    prepared = _prepared(config)
    cluster.connect()
    cluster.check_seen(prepared.clips)
    trial = flow.trial(job.flow_of(prepared, storage.absolute(config.out), config.limits, config.pools))
    return cost.estimate(trial, prepared.num_samples, place.amounts("--price", config.price))


def _prepared(config: Pseudolabel) -> Prepared:
    from speechdistill.engine import cluster

    cluster.be_patient()
    weights, head = (path and storage.absolute(path) for path in (config.labeller.weights, config.labeller.head))
    labeller = replace(config.labeller, weights=weights, head=head)
    return job.prepared(storage.absolute(config.clips), config.samples, labeller, config.stored)


def _labelled(config: Pseudolabel, prepared: Prepared) -> LabelSummary:
    from speechdistill.engine import flow

    identity = prepared.identity
    if shards.configuration(config.out) is None:
        check_each_once(prepared.clips)
    shards.claim(config.out, identity)
    prepared = _with_copies(prepared, config.out)
    earlier = shards.listed(config.out)
    # With a smaller number than before, all earlier samples stay.
    rows = config.stored.rows_per_part
    num_samples = max([prepared.num_samples, *(k * rows + count for k, count in earlier.items())])
    prepared = replace(prepared, num_samples=num_samples)
    _warn_made_again(earlier, rows, num_samples)
    about = {**_about(config), "fingerprint": fingerprint.of(identity)}
    with Tracking(config.out, "pseudolabel", prepared.recipe.name, _parameters(config, prepared)) as tracking:
        session = figures.Session()
        run = replace(
            job.flow_of(prepared, config.out, config.limits, config.pools),
            on_part=session.add,
            report=lambda now: tracking.metrics(figures.live(now), step=int(now["done"])),
        )
        totals = flow.run(run)
        if not totals.complete:
            tracking.status = "KILLED"
            session.count(totals.done - sum(earlier.values()))
        known = {**figures.summary(config.out, totals, session), **about}
        summary = LabelSummary(**known, complete=totals.complete, wanted=num_samples)
        _publish(config.out, summary, tracking)
    return summary


def _publish(out: str, summary: LabelSummary, tracking: Tracking) -> None:
    """Write and track the summary; an earlier session's file stays if this session has labelled nothing."""
    if summary.complete and shards.completed(out) and not summary.session_samples:
        return
    values = summary.to_json()
    if summary.complete:
        shards.complete(out, values)
        tracking.figure(figures.histogram(values), "scores.png")
        tracking.document(values, "summary.json")
    numbers = {key: value for key, value in values.items() if isinstance(value, (int, float))}
    tracking.metrics(numbers, step=summary.num_samples)


def _warn_made_again(earlier: Mapping[int, int], rows_per_part: int, num_samples: int) -> None:
    """Warn of samples that are labelled a second time: a part that grows is written again as a whole."""
    for k, count in earlier.items():
        first = k * rows_per_part
        if count < min(rows_per_part, num_samples - first):
            text = "samples %d to %d are labelled again: they share a file of %d (--rows-per-part) with new samples"
            _LOG.warning(text, first, first + count - 1, rows_per_part)


def _with_copies(prepared: Prepared, out: str) -> Prepared:
    """Copy the manifest and a registered teacher into the run, for its workers: both may change meanwhile."""
    labeller = replace(prepared.labeller, teacher=_keep_teacher(prepared.labeller.teacher, out))
    return replace(prepared, clips=_keep_manifest(prepared, out), labeller=labeller)


def _keep_manifest(prepared: Prepared, out: str) -> str:
    """Copy the manifest, also in the format that workers map, and return the address of the mapped file."""
    copy = f"{out}/clips.parquet"
    fs, path = storage.file_system(copy)
    with storage.access(copy):
        is_there = fs.exists(path)
    if is_there and fingerprint.of_file(copy) != prepared.clips_sha256:
        _LOG.warning("%s has changed since the run was started; it is copied from %s again", copy, prepared.clips)
        is_there = False
    if not is_there:
        with storage.access(prepared.clips), storage.opened(prepared.clips) as file:
            data = file.read()
        if hashlib.sha256(data).hexdigest() != prepared.clips_sha256:
            raise RunError(f"{prepared.clips} has just changed", "rerun the command when its ingest has ended")
        storage.publish(data, copy)
    return share(copy, out, prepared.clips_sha256)


def _keep_teacher(teacher: str, out: str) -> str:
    """Copy a teacher from MLflow: workers may not reach the server, and the alias may move meanwhile."""
    if not teacher.startswith(MODEL_ADDRESSES):
        return teacher
    from speechdistill.io import checkpoint
    from speechdistill.tracking import registry

    copy = f"{out}/teacher"
    with registry.student_folder(teacher) as folder:
        checkpoint.copy(folder, copy)
    return copy


def _about(config: Pseudolabel) -> dict[str, Any]:
    return {
        "recipe": config.samples.recipe,
        "teacher": config.labeller.teacher,
        "seed": config.samples.seed,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _parameters(config: Pseudolabel, prepared: Prepared) -> dict[str, Any]:
    hashes = {"clips_sha256": prepared.clips_sha256, "teacher_sha256": prepared.teacher.sha256}
    return {**flat(config), **hashes}
