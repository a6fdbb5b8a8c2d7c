# commands/: the commands of `speechdistill`, a file for each (its options and what it does), and what they share.
"""Compare models on clips that listeners scored: score all of them once, then figures, tables and a page."""

import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

import tyro

from speechdistill.commands import outputs
from speechdistill.commands.guarded import guarded
from speechdistill.comparing import candidates, comparison, judged, page, plots, scoring, tables
from speechdistill.comparing.comparison import Comparison
from speechdistill.engine import cluster
from speechdistill.io import audio, fingerprint, lease, storage, table
from speechdistill.io.errors import RunError
from speechdistill.io.version import __version__
from speechdistill.tracking.run import Tracking

_FILES = (
    *("scores.parquet", "table.md", "table.csv", "metrics.csv", "paper.csv", "report.html", "summary.json"),
    *("plots/plot", "scores/run"),
)


@dataclass(frozen=True)
class Compare:
    """Compare models on clips that listeners scored: tables, figures and a page, with intervals.

    The same command resumes a comparison that was stopped, and one with more models or clips scores only these.
    """

    clips: str
    """Clips with listeners' scores: a manifest of the ingest job, or a list (CSV, JSONL, Parquet) with columns path and
    mos, and where known dataset and system. Those of split test where there are some, else all but those of split
    train. Or the folder of a label run: its held-out samples, with the teacher's scores. A model that was trained or
    selected on some of the clips is marked."""
    out: str
    """Folder of the comparison, a local path or URL."""
    models: str = "distillmos"
    """Names separated by commas: distillmos, xlsr, dnsmos_p808, dnsmos_p835, squim, nisqa, utmos, or what was trained
    here: folders of checkpoints, models:/NAME@champion and the like. NAME=ADDRESS gives one another name. The first is
    the one whose worst clips are shown."""
    weights: dict[str, str] = field(default_factory=dict)
    """Weights of a model that are not where its usual tools keep them, NAME and a file or URL, of xlsr the encoder's
    folder or hf://OWNER/NAME. May be repeated."""
    head: str | None = None
    """Of model xlsr, the file of the head above the encoder. Default: the original one from the wheel xls-r-sqa."""
    paper: bool = False
    """Print our table beside the paper's, with differences."""
    tracking: str | None = None
    """Output folder whose mlflow.db has the students, where MLFLOW_TRACKING_URI is not set."""
    max_reject_share: float = 0.05
    """Stop when more than this share of the files cannot be read or decoded."""
    resamples: int = 1_000
    """Resamples of the bootstrap."""
    seed: int = 0
    """Decides what the bootstrap draws."""


@guarded("what is scored is kept, and the same command goes on from there")
def command(config: Annotated[tyro.conf.UseAppendAction[Compare], tyro.conf.arg(name="")]) -> int:
    found = run(config)
    print(tables.as_text(tables.table_one(found)))
    for line in tables.heard(found):
        print(f"note: {line}")
    for line in tables.gaps(found):
        print(f"no figure of {line}")
    for line in tables.left_out(found):
        print(f"in no figure: {line}")
    if config.paper:
        beside = tables.beside_paper(found)
        none = "none of these models on these datasets is in it"
        print(f"\nbeside the paper's Table I:\n{tables.as_text(beside) if len(beside) > 1 else none}")
    print(f"the page: {config.out}/report.html (scores.parquet, table.md, metrics.csv and plots are beside it)")
    return 0


def run(config: Compare) -> Comparison:
    """Score what is not scored yet, and write `scores.parquet`, `table.md`, `table.csv`, `metrics.csv`, `plots/*` and
    `report.html`, and `summary.json` last.

    Raises `UserError` with the cause and the fix; what was scored is kept.
    """
    _validate(config)
    cluster.be_patient()
    out = storage.absolute(config.out)
    wanted = candidates.listed(config.models)
    outputs.try_job(out, "compare", *_FILES)
    with lease.held(out, "compare"):
        return _compared(config, wanted, out)


def _compared(config: Compare, wanted: dict[str, str], out: str) -> Comparison:
    found = candidates.load(wanted, out, config.weights, config.head, config.tracking)
    clips = judged.clips(config.clips)
    about = _parameters(config, found)
    with Tracking(out, "compare", clips.source.rsplit("/", 1)[-1], about) as tracking:
        share = config.max_reject_share
        scores = scoring.score(found, clips.clips, out, share, lambda f: tracking.metrics(f, step=int(f["done"])))
        compared = comparison.compared(clips, found, scores, config.resamples, config.seed, _about(config, clips))
        if not compared.counts.any():
            reason = f"{config.clips}: no clip has a score of every model; {_first_reason(compared)}"
            raise RunError(reason, "leave that model out, or give clips that it can score")
        _written(compared, config, out, tracking)
    return compared


def _validate(config: Compare) -> None:
    if not 0 <= config.max_reject_share <= 1:
        raise RunError(f"--max-reject-share is {config.max_reject_share}", "it must be from 0 to 1")
    if config.resamples < 100:
        raise RunError(f"--resamples is {config.resamples}", "100 are the least that have a 95% interval")
    if config.seed < 0:
        raise RunError(f"--seed is {config.seed}", "it must be at least 0")


def _written(found: Comparison, config: Compare, out: str, tracking: Tracking) -> None:
    storage.publish(table.parquet_bytes(table.from_rows(found.rows, "score.v1")), f"{out}/scores.parquet")
    files = {
        "table.md": tables.markdown(found).encode("utf-8", "backslashreplace"),
        "table.csv": tables.as_csv(tables.table_one(found)),
        "metrics.csv": tables.as_csv(tables.long(found)),
    }
    if config.paper:
        files["paper.csv"] = tables.as_csv(tables.beside_paper(found))
    figures = plots.all_plots(found)
    for name, figure in figures.items():
        files |= {f"plots/{name}.png": plots.png(figure), f"plots/{name}.svg": plots.svg(figure, name)}
    files["report.html"] = page.html(found, figures).encode()
    for name, data in files.items():
        storage.publish(data, f"{out}/{name}")
        tracking.file(data, name)
    summary = _summary(found)
    storage.publish_json(summary, f"{out}/summary.json")
    tracking.document(summary, "summary.json")
    tracking.metrics(_metrics(found), step=len(found.clips))


def _summary(found: Comparison) -> dict[str, Any]:
    return {
        "models": {
            model.name: {
                "address": model.address,
                "sha256": model.sha256,
                "parameters": model.parameters,
                "series": model.series,
                "cpu_ms_per_audio_s": found.cost[model.name],
                "mean_pcc": {
                    kind: getattr(found.by_clip.means[model.name]["pcc"], kind)._asdict()
                    for kind in ("weighted", "plain")
                },
            }
            for model in found.models
        },
        "judge": found.judged.judge,
        "clips": len(found.clips),
        "clips_that_count": found.by_clip.clips,
        "heard": {name: dict(counts) for name, counts in found.heard.items()},
        "left_out": {dataset: dict(reasons) for dataset, reasons in found.left_out.items()},
        "differences": [
            {"model": one, "less": other, **by._asdict()} for (one, other), by in found.differences.items()
        ],
        **found.about,
    }


def _metrics(found: Comparison) -> dict[str, float]:
    """With the characters that MLflow takes in a name."""
    values: dict[str, float | None] = {}
    for model in found.models:
        name = re.sub(r"[^\w.\- /]", "_", model.name)
        mean = found.by_clip.means[model.name]
        values[f"{name}/pcc_weighted"], values[f"{name}/pcc_unweighted"] = (m.value for m in mean["pcc"][:2])
        values[f"{name}/rmse_third_weighted"] = mean["rmse_third"].weighted.value
        values[f"{name}/cpu_ms_per_audio_s"] = found.cost[model.name]
    return {key: value for key, value in values.items() if value is not None}


def _first_reason(found: Comparison) -> str:
    reasons = [reason for of_dataset in found.left_out.values() for reason in of_dataset]
    return f"the first because {reasons[0]}" if reasons else "there are no clips"


def _about(config: Compare, clips: judged.Judged) -> dict[str, Any]:
    versions = {"speechdistill": __version__, "python": platform.python_version(), **audio.codec_versions()}
    return {
        "configuration": asdict(config),
        "clips_sha256": fingerprint.of([[clip.sha256, clip.dataset, clip.mos] for clip in clips.clips]),
        "versions": versions,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _parameters(config: Compare, found: list[candidates.Candidate]) -> Mapping[str, Any]:
    return {**asdict(config), "models_sha256": {model.name: model.sha256 for model in found}}
