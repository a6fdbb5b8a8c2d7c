# commands/: the commands of `speechdistill`, a file for each (its options and what it does), and what they share.
"""Compare models on clips that listeners scored: score all of them once, then figures, tables and a page."""

import platform
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from speechdistill.commands import outputs
from speechdistill.commands.guarded import guarded
from speechdistill.commands.resampling import Bootstrap
from speechdistill.comparing import tables
from speechdistill.io import audio, fingerprint, lease, storage, table
from speechdistill.io.errors import RunError
from speechdistill.io.options import OptionError
from speechdistill.io.version import __version__
from speechdistill.tracking.run import Tracking

if TYPE_CHECKING:  # these import ray, which `--help` does not need
    from speechdistill.comparing.candidates import Candidate
    from speechdistill.comparing.comparison import Comparison
    from speechdistill.comparing.judged import Judged

_FILES = (
    *("scores.parquet", "table.md", "table.csv", "metrics.csv", "paper.csv", "report.html", "summary.json"),
    *("plots/plot", "scores/run"),
)


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Compare models on clips that listeners scored: tables, figures and a page, with intervals.

    The same command resumes; with more models or clips it scores only the new ones.
    """

    clips: str
    """Clips with listeners' scores: a manifest of the ingest job, or a list (CSV, JSONL, Parquet) with columns path and
    mos, and if known dataset and system. Clips of split test if there are any, else all but those of split train. Or
    the folder of a label run: its held-out samples, with the teacher's scores. A model that was trained or selected on
    some of the clips is marked."""
    out: str
    """Folder of the comparison, a local path or URL."""
    models: str = "distillmos"
    """Names separated by commas: distillmos, xlsr, dnsmos_p808, dnsmos_p835, squim, nisqa, utmos, or models that were
    trained here: folders of checkpoints, models:/NAME@champion and the like. NAME=ADDRESS gives a model another name.
    The page shows the worst clips of the first model."""
    weights: dict[str, str] = field(default_factory=dict)
    """Weights of a model that are not where its usual tools keep them: NAME and a file or URL, for xlsr the encoder's
    folder or hf://OWNER/NAME. May be repeated."""
    head: str | None = None
    """For model xlsr, the file of the head above the encoder. Default: the original one from the wheel xls-r-sqa."""
    paper: bool = False
    """Print our table beside the paper's, with differences."""
    tracking: str | None = None
    """Output folder whose mlflow.db has the students, if MLFLOW_TRACKING_URI is not set."""
    max_reject_share: float = 0.05
    """Stop if more than this share of the files cannot be read or decoded."""
    bootstrap: Bootstrap = Bootstrap()

    def __post_init__(self) -> None:
        if not 0 <= self.max_reject_share <= 1:
            raise OptionError(f"--max-reject-share is {self.max_reject_share}", "it must be from 0 to 1")

    def to_json(self) -> dict[str, Any]:
        """Return all options by name, as `summary.json` and MLflow have them."""
        values = asdict(self)
        return {**values, **values.pop("bootstrap")}


@guarded("scores so far are kept; the same command resumes")
def command(
    config: Annotated[tyro.conf.OmitArgPrefixes[tyro.conf.UseAppendAction[Compare]], tyro.conf.arg(name="")],
) -> int:
    comparison = run(config)
    print(tables.as_text(tables.table_one(comparison)))
    for line in tables.heard(comparison):
        print(f"note: {line}")
    for line in tables.gaps(comparison):
        print(f"no figure for {line}")
    for line in tables.left_out(comparison):
        print(f"in no figure: {line}")
    if config.paper:
        beside = tables.beside_paper(comparison)
        none = "it has none of these models on these datasets"
        print(f"\nbeside the paper's Table I:\n{tables.as_text(beside) if len(beside) > 1 else none}")
    print(f"the page: {config.out}/report.html (scores.parquet, table.md, metrics.csv and plots are beside it)")
    return 0


def run(config: Compare) -> "Comparison":
    """Compute the missing scores, and write tables, `plots/*`, `report.html`, and `summary.json` last.

    Raises `UserError` with the cause and the fix; scores so far are kept.
    """
    from speechdistill.comparing import candidates
    from speechdistill.engine import cluster

    cluster.be_patient()
    out = storage.absolute(config.out)
    wanted = candidates.listed(config.models)
    outputs.try_job(out, "compare", *_FILES)
    with lease.held(out, "compare"):
        return _compared(config, wanted, out)


def _compared(config: Compare, wanted: dict[str, str], out: str) -> "Comparison":
    from speechdistill.comparing import candidates, comparison, judged, scoring

    models = candidates.load(wanted, out, config.weights, config.head, config.tracking)
    clips = judged.clips(config.clips)
    about = _parameters(config, models)
    with Tracking(out, "compare", clips.source.rsplit("/", 1)[-1], about) as tracking:
        share = config.max_reject_share
        scores = scoring.score(models, clips.clips, out, share, lambda f: tracking.metrics(f, step=int(f["done"])))
        resamples, seed = config.bootstrap.resamples, config.bootstrap.seed
        compared = comparison.compared(clips, models, scores, resamples, seed, _about(config, clips))
        if not compared.counts.any():
            reason = f"{config.clips}: no clip has a score of every model; {_first_reason(compared)}"
            raise RunError(reason, "leave that model out, or give clips that it can score")
        _written(compared, config, out, tracking)
    return compared


def _written(comparison: "Comparison", config: Compare, out: str, tracking: Tracking) -> None:
    from speechdistill.comparing import page, plots

    storage.publish(table.parquet_bytes(table.from_rows(comparison.rows, "score.v1")), f"{out}/scores.parquet")
    files = {
        "table.md": tables.markdown(comparison).encode("utf-8", "backslashreplace"),
        "table.csv": tables.as_csv(tables.table_one(comparison)),
        "metrics.csv": tables.as_csv(tables.long(comparison)),
    }
    if config.paper:
        files["paper.csv"] = tables.as_csv(tables.beside_paper(comparison))
    figures = plots.all_plots(comparison)
    for name, figure in figures.items():
        files |= {f"plots/{name}.png": plots.png(figure), f"plots/{name}.svg": plots.svg(figure, name)}
    files["report.html"] = page.html(comparison, figures).encode()
    for name, data in files.items():
        storage.publish(data, f"{out}/{name}")
        tracking.file(data, name)
    summary = _summary(comparison)
    storage.publish_json(summary, f"{out}/summary.json")
    tracking.document(summary, "summary.json")
    tracking.metrics(_metrics(comparison), step=len(comparison.clips))


def _summary(comparison: "Comparison") -> dict[str, Any]:
    return {
        "models": {
            model.name: {
                "address": model.address,
                "sha256": model.sha256,
                "parameters": model.parameters,
                "series": model.series,
                "cpu_ms_per_audio_s": comparison.cost[model.name],
                "mean_pcc": {
                    kind: getattr(comparison.by_clip.means[model.name]["pcc"], kind)._asdict()
                    for kind in ("weighted", "plain")
                },
            }
            for model in comparison.models
        },
        "judge": comparison.judged.judge,
        "clips": len(comparison.clips),
        "clips_that_count": comparison.by_clip.clips,
        "heard": {name: dict(counts) for name, counts in comparison.heard.items()},
        "left_out": {dataset: dict(reasons) for dataset, reasons in comparison.left_out.items()},
        "differences": [
            {"model": one, "less": other, **by._asdict()} for (one, other), by in comparison.differences.items()
        ],
        **comparison.about,
    }


def _metrics(comparison: "Comparison") -> dict[str, float]:
    """Return metrics under names that MLflow accepts."""
    values: dict[str, float | None] = {}
    for model in comparison.models:
        name = re.sub(r"[^\w.\- /]", "_", model.name)
        mean = comparison.by_clip.means[model.name]
        values[f"{name}/pcc_weighted"], values[f"{name}/pcc_unweighted"] = (m.value for m in mean["pcc"][:2])
        values[f"{name}/rmse_third_weighted"] = mean["rmse_third"].weighted.value
        values[f"{name}/cpu_ms_per_audio_s"] = comparison.cost[model.name]
    return {key: value for key, value in values.items() if value is not None}


def _first_reason(comparison: "Comparison") -> str:
    reasons = [reason for of_dataset in comparison.left_out.values() for reason in of_dataset]
    return f"the first because {reasons[0]}" if reasons else "there are no clips"


def _about(config: Compare, clips: "Judged") -> dict[str, Any]:
    versions = {"speechdistill": __version__, "python": platform.python_version(), **audio.codec_versions()}
    return {
        "configuration": config.to_json(),
        "clips_sha256": fingerprint.of([[clip.sha256, clip.dataset, clip.mos] for clip in clips.clips]),
        "versions": versions,
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _parameters(config: Compare, models: "Sequence[Candidate]") -> dict[str, Any]:
    return {**config.to_json(), "models_sha256": {model.name: model.sha256 for model in models}}
