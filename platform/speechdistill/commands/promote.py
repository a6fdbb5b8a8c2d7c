"""Promotion: a run's student becomes the champion only if it follows listeners better than the champion does.

The rule: on the same clips, the mean over datasets of the PCC, weighted by clips, must be higher than the champion's by
at least `margin`, and the lower bound of the difference's 95% bootstrap interval must be above 0
(`metrics/correlation.py`). Where there is no champion, the student becomes it if its own mean is at least 0.3.

In MLflow, the alias `champion` of a model name is the version in use and `previous` the one before it. Every step may
be repeated: a killed promotion is finished by the same command.
"""

import json
import logging
import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
import tyro
from tqdm import tqdm

from speechdistill.commands import score
from speechdistill.commands.guarded import guarded
from speechdistill.data import heard, scored_clips
from speechdistill.io.errors import AudioError, UnreadableError, UserError
from speechdistill.metrics import correlation
from speechdistill.models.label import Teacher, Unscorable
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions
from speechdistill.tracking.run import checked_uri

if TYPE_CHECKING:
    from speechdistill.tracking.registry import Logged, Registry, Version

CHAMPION, PREVIOUS = "champion", "previous"
METRIC = "best_val_mse"
"""Of the child runs of a run, the one with the lowest is its best."""

_BEST_OF = "best-of:"
_FIRST_PCC = 0.3  # below it, a first champion follows listeners hardly better than chance on a few clips
_TAG = 5_000  # characters that MLflow keeps of a tag everywhere
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Promote:
    """Make a run's student the champion of a model name if it is better than the champion on labeled clips.

    Prints the decision as JSON. Exit code 0: it is the champion (with --dry-run: it would be); 3: it is not, since it
    is not better; 1: an error, and nothing was decided.
    """

    model_name: str = "speech-quality-v0"
    """The registered model whose aliases champion and previous are moved."""
    run: str | None = None
    """MLflow run that logged the student, or best-of:PARENT: among the finished child runs of run PARENT, the one with
    the lowest best_val_mse."""
    eval: str | None = None
    """Clips with listeners' scores: a manifest of the ingest job, or a list (CSV, JSONL, Parquet) with columns path,
    mos and dataset or corpus. Those of split test where there are some, else all but those of split train. Clips that
    trained one of the two models are left out."""
    margin: float = 0.005
    """How much higher the mean PCC over datasets, weighted by clips, must be. The lower bound of the difference's 95%
    bootstrap interval must be above 0, too."""
    resamples: int = 2_000
    """Resamples of the bootstrap."""
    seed: int = 0
    """Decides what the bootstrap draws."""
    encoder: str | None = None
    """Where the speech encoder of trained teachers is, if not where it was in training."""
    tracking: str | None = None
    """Output folder whose mlflow.db is used where MLFLOW_TRACKING_URI is not set."""
    force: bool = False
    """Promote a first champion even if its mean PCC is below 0.3."""
    dry_run: bool = False
    """Decide and print, and change nothing."""
    rollback: bool = False
    """Instead: swap champion and previous back."""


class PromotionError(UserError):
    """A promotion that cannot be decided: why, and what to do."""


class Scored(NamedTuple):
    """The clips that both models could score; arrays of shape (clips,). `excluded` has uri and reason of the others,
    `selected_on` how many of the clips chose a model's best checkpoint.
    """

    datasets: list[str]
    mos: np.ndarray
    candidate: np.ndarray
    champion: np.ndarray | None
    excluded: list[dict[str, str]]
    selected_on: dict[str, int]


@guarded("the same command goes on; the champion is moved last")
def command(config: Annotated[Promote, tyro.conf.arg(name="")]) -> int:
    decision = run(config)
    print(json.dumps(decision, indent=2, ensure_ascii=False))
    return 3 if decision["decision"] == "kept" else 0


def run(config: Promote) -> dict[str, Any]:
    """Decide, and without `dry_run` do it; returns the decision as JSON values.

    `decision` is `promoted`, `kept` (the old champion stays, or there is still none), `unchanged` (the student is the
    champion already) or `rolled_back`. Raises `UserError` with the cause and the fix.
    """
    from speechdistill.tracking.registry import Registry

    _validate(config)
    registry = Registry(checked_uri(config.tracking) if config.tracking else None)
    champion = registry.by_alias(config.model_name, CHAMPION)
    if config.rollback:
        return _rolled_back(config, registry, champion)
    candidate = _candidate(config, registry)
    about = {
        "model_name": config.model_name,
        "dry_run": config.dry_run,
        "candidate": {"run_id": candidate.run_id, "model": candidate.uri, "tags": candidate.tags},
        "champion": champion and champion._asdict(),
    }
    if champion and champion.source in candidate.sources:
        reason = f"version {champion.number} is this run's student: it is the champion already"
        return {"decision": "unchanged", "reason": reason, **about}
    scored = _scored(config, registry, candidate, champion)
    decision = {**_decided(config, scored), **about, "clips": _clips(config, scored)}
    return decision if config.dry_run else _carried_out(config, registry, candidate, champion, decision)


def _validate(config: Promote) -> None:
    if config.rollback:
        if config.run or config.eval:
            raise PromotionError("--rollback swaps champion and previous", "give it no --run and no --eval")
        return
    if not config.run or not config.eval:
        raise PromotionError(
            "nothing to promote", "give --run, the MLflow run of the student, and --eval, clips with listeners' scores"
        )
    if not 0 <= config.margin < 2:
        raise PromotionError(f"--margin is {config.margin}", "it must be a difference of correlations, from 0 to 2")
    if config.resamples < 100:
        raise PromotionError(f"--resamples is {config.resamples}", "100 are the least that have a 95% interval")
    if config.seed < 0:
        raise PromotionError(f"--seed is {config.seed}", "it must be at least 0")


def _candidate(config: Promote, registry: "Registry") -> "Logged":
    run_id = str(config.run)
    if run_id.startswith(_BEST_OF):
        run_id = registry.best_of(run_id.removeprefix(_BEST_OF), METRIC)
    models = registry.logged(run_id)
    if not models:
        raise PromotionError(
            f"run {run_id} has logged no student",
            "log its best checkpoint with speechdistill.tracking.registry.log_student, which training does at its end",
        )
    return models[0]


def _scored(config: Promote, registry: "Registry", candidate: "Logged", champion: "Version | None") -> Scored:
    """Both models over all clips; a clip that has no score of both, or trained one, is left out for both."""
    from speechdistill.io import checkpoint
    from speechdistill.tracking.registry import student_folder

    clips = scored_clips.held_out(str(config.eval))
    uris = clips["uri"].to_pylist()
    datasets = scored_clips.dataset_names(clips)
    models, marks = [], {}
    with ExitStack() as folders:
        for name, address in {"candidate": candidate.uri, **({"champion": champion.uri} if champion else {})}.items():
            folder = folders.enter_context(student_folder(address, registry.uri))
            models.append(load_teacher(folder, TeacherOptions(weights=config.encoder)))
            marks[name] = heard.marks(checkpoint.provenance(folder), clips["clip_id"].to_pylist())
    kept: list[int] = []
    rows: list[list[float]] = []
    excluded = []
    progress = tqdm(score.decoded(uris), total=len(uris), unit="clip", dynamic_ncols=True)
    for number, (uri, wave) in enumerate(progress):
        try:
            if by := [name for name, of_model in marks.items() if of_model[number] == heard.TRAINED]:
                raise _Unusable(f"the {' and the '.join(by)} {'was' if len(by) == 1 else 'were'} trained on it")
            rows.append([_mos(model, wave) for model in models])
            kept.append(number)
        except _Unusable as error:
            excluded.append({"uri": uri, "reason": str(error)})
            _LOG.warning("%s: %s; it counts for neither model", uri, error)
    scores = np.array(rows, float).reshape(len(rows), len(models))
    mos = clips["mos"].to_numpy()[kept]
    of_champion = scores[:, 1] if champion else None
    chosen = {name: sum(of_model[i] == heard.SELECTED for i in kept) for name, of_model in marks.items()}
    for name, count in chosen.items():
        if count:
            _LOG.warning("the %s's best checkpoint was chosen by %d of the %d clips", name, count, len(kept))
    return Scored([datasets[i] for i in kept], mos, scores[:, 0], of_champion, excluded, chosen)


class _Unusable(ValueError):
    """Why a clip counts for no model."""


def _mos(model: Teacher, wave: np.ndarray | Exception) -> float:
    if isinstance(wave, UnreadableError):  # the storage's fault, perhaps: not to be decided around
        raise wave
    if isinstance(wave, AudioError):
        raise _Unusable(f"{wave.reason}; {wave.fix}")
    if isinstance(wave, Exception):
        raise wave
    (label,) = model.label([wave])
    if isinstance(label, Unscorable):
        raise _Unusable(str(label))
    if not math.isfinite(label.score):
        raise _Unusable("a student scores it as NaN")
    return label.score


def _decided(config: Promote, scored: Scored) -> dict[str, Any]:
    """decision, reason, rule, mean_pcc, difference and datasets."""
    models = {"candidate": scored.candidate}
    if scored.champion is not None:
        models["champion"] = scored.champion
    means = {name: correlation.mean_pcc(scored.datasets, scored.mos, values) for name, values in models.items()}
    if means["candidate"] is None:
        first = f", the first because {scored.excluded[0]['reason']}" if scored.excluded else ""
        raise PromotionError(
            f"{config.eval}: no dataset has {correlation.MIN_CLIPS} scored clips with different mos "
            f"({len(scored.datasets)} clips were scored, {len(scored.excluded)} could not be{first})",
            "give more clips",
        )
    answer: dict[str, Any] = {**_first(means["candidate"], config.force), "difference": None}
    if scored.champion is not None:
        versus = (scored.datasets, scored.mos, scored.candidate, scored.champion, config.resamples, config.seed)
        difference = correlation.compare(*versus)
        assert difference is not None  # as for the means: both depend on the listeners alone
        answer = {**_verdict(difference, config.margin), "difference": difference._asdict()}
    rule = {"margin": config.margin, "confidence": correlation.CONFIDENCE}
    rule |= {"resamples": config.resamples, "seed": config.seed}
    tables = correlation.by_dataset(scored.datasets, scored.mos, models)
    return {**answer, "rule": rule, "mean_pcc": means, "datasets": tables}


def _first(pcc: float, force: bool) -> dict[str, str]:
    """decision and reason where there is no champion."""
    if pcc >= _FIRST_PCC or force:
        return {"decision": "promoted", "reason": "there is no champion yet"}
    reason = f"there is no champion yet, but its mean PCC is {pcc:.4f}, below {_FIRST_PCC}; give --force to promote it"
    return {"decision": "kept", "reason": reason}


def _verdict(difference: correlation.Difference, margin: float) -> dict[str, str]:
    found = (
        f"its mean PCC is {difference.value:+.4f} from the champion's ({difference.low:+.4f}..{difference.high:+.4f})"
    )
    if difference.value < margin:
        return {"decision": "kept", "reason": f"{found}; the margin is {margin:+.4f}"}
    if difference.low <= 0:
        return {"decision": "kept", "reason": f"{found}; the interval must lie above 0: more clips make it narrower"}
    return {"decision": "promoted", "reason": found}


def _clips(config: Promote, scored: Scored) -> dict[str, Any]:
    about = {"source": config.eval, "scored": len(scored.datasets), "excluded": scored.excluded}
    return {**about, "selected_on": scored.selected_on}


def _carried_out(
    config: Promote, registry: "Registry", candidate: "Logged", champion: "Version | None", decision: dict[str, Any]
) -> dict[str, Any]:
    """Register, store the decision, and move the aliases last: `previous` before `champion`."""
    version = registry.register(config.model_name, candidate)
    decision["candidate"]["version"] = version.number
    registry.document(candidate.run_id, decision, f"promotion/{config.model_name}.json")
    registry.note(version, _tags(decision))
    if decision["decision"] != "promoted":
        return decision
    if registry.by_alias(config.model_name, CHAMPION) != champion:
        raise PromotionError(f"another promotion has moved {config.model_name}@{CHAMPION}", "rerun the command")
    if champion:
        registry.point(config.model_name, PREVIOUS, champion)
    registry.point(config.model_name, CHAMPION, version)
    return decision


def _tags(decision: dict[str, Any]) -> dict[str, str]:
    """What a version shows in MLflow's own pages; all of it is in the run's artifact."""
    values: dict[str, Any] = {key: decision[key] for key in ("decision", "reason")}
    values["against_version"] = decision["champion"] and decision["champion"]["number"]
    values["eval"] = decision["clips"]["source"]
    for key in ("mean_pcc", "difference", "rule"):
        values |= {f"{key}.{name}": value for name, value in (decision[key] or {}).items()}
    tables = json.dumps(decision["datasets"], ensure_ascii=False)
    values["datasets"] = tables if len(tables) <= _TAG else "see the run's artifact"
    return {f"promotion.{key}": str(value) for key, value in values.items() if value is not None}


def _rolled_back(config: Promote, registry: "Registry", champion: "Version | None") -> dict[str, Any]:
    previous = registry.by_alias(config.model_name, PREVIOUS)
    if champion is None:
        raise registry.lacks(config.model_name, CHAMPION)
    if previous is None or previous == champion:
        reason = f"{config.model_name} has no {PREVIOUS} champion at {registry.place}"
        raise PromotionError(reason, "nothing was changed: a second promotion makes one")
    if not config.dry_run:
        registry.point(config.model_name, CHAMPION, previous)
        registry.point(config.model_name, PREVIOUS, champion)
    return {
        "decision": "rolled_back",
        "reason": f"version {previous.number} is the champion again; version {champion.number} is {PREVIOUS}",
        "model_name": config.model_name,
        "dry_run": config.dry_run,
        "champion": previous._asdict(),
        "previous": champion._asdict(),
    }
