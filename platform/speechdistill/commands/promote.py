"""Promotion: a run's student becomes the champion if it follows listeners better (the rule: `commands/decision.py`).

In MLflow, the alias `champion` of a model name is the version in use and `previous` the one before it. Every step may
be repeated: the same command finishes a promotion that was killed.
"""

import json
import logging
import math
import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro
from tqdm import tqdm

from speechdistill.commands import score
from speechdistill.commands.decision import Contender, Decision, PromotionError, Scored, decided
from speechdistill.commands.guarded import guarded
from speechdistill.commands.resampling import Bootstrap
from speechdistill.data import heard, scored_clips
from speechdistill.io.errors import AudioError, UnreadableError
from speechdistill.io.options import OptionError
from speechdistill.models.label import Teacher, Unscorable
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions
from speechdistill.tracking.run import checked_uri, run_id

if TYPE_CHECKING:
    from speechdistill.tracking.registry import Logged, Registry, Version

CHAMPION, PREVIOUS = "champion", "previous"

_BEST_OF = "best-of:"
_TAG = 5_000  # characters that MLflow keeps of a tag everywhere
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Promote:
    """Make a run's student the champion of a model name if it is better than the champion on labeled clips.

    Prints the decision as JSON. Exit code 0: the student is the champion (with --dry-run: it would be); 3: it is not,
    since it is not better; 1: an error, and nothing was decided.
    """

    model_name: str = "speech-quality-v0"
    """The registered model whose aliases champion and previous are moved."""
    run: str | None = None
    """MLflow run that logged the student; or best-of:PARENT, the best finished child run of run PARENT by the lowest
    best_val_mse; or the OUT folder of train-students, for its best student."""
    eval: str | None = None
    """Clips with listeners' scores: a manifest of the ingest job, or a list (CSV, JSONL, Parquet) with columns path,
    mos and dataset or corpus. Clips of split test if there are any, else all but those of split train. Clips that
    trained one of the two models are left out."""
    margin: float = 0.005
    """Smallest difference of the mean PCC over datasets, weighted by clips. The lower bound of the difference's 95%
    bootstrap interval must also be above 0."""
    bootstrap: Bootstrap = Bootstrap(resamples=2_000)
    encoder: str | None = None
    """Place of the speech encoder of trained teachers, if not where it was in training."""
    tracking: str | None = None
    """Output folder whose mlflow.db is used if MLFLOW_TRACKING_URI is not set. Default: the folder of --run, if it is
    one."""
    force: bool = False
    """Promote a first champion even if its mean PCC is below 0.3."""
    dry_run: bool = False
    """Decide and print, and change nothing."""
    rollback: bool = False
    """Swap champion and previous instead."""

    def __post_init__(self) -> None:
        if self.rollback:
            if self.run or self.eval:
                raise OptionError("--rollback swaps champion and previous", "leave out --run and --eval")
            return
        if not self.run or not self.eval:
            fix = "give --run, the MLflow run of the student, and --eval, clips with listeners' scores"
            raise OptionError("nothing to promote", fix)
        if not 0 <= self.margin < 2:
            raise OptionError(f"--margin is {self.margin}", "it must be a difference of correlations, from 0 to 2")


@guarded("the same command resumes; the champion is moved last")
def command(config: Annotated[tyro.conf.OmitArgPrefixes[Promote], tyro.conf.arg(name="")]) -> int:
    decision = run(config)
    print(json.dumps(decision.to_json(), indent=2, ensure_ascii=False))
    return 3 if decision.decision == "kept" else 0


def run(config: Promote) -> Decision:
    """Decide, and without `dry_run` carry the decision out; raises `UserError` with the cause and the fix."""
    from speechdistill.tracking.registry import Registry

    folder = config.tracking or (config.run if _is_folder(config.run) else None)
    registry = Registry(checked_uri(folder) if folder else None)
    champion = registry.by_alias(config.model_name, CHAMPION)
    if config.rollback:
        return _rolled_back(config, registry, champion)
    candidate = _candidate(config, registry)
    about: dict[str, Any] = {
        "model_name": config.model_name,
        "dry_run": config.dry_run,
        "champion": champion,
        "candidate": Contender.of(candidate),
    }
    if champion and champion.source in candidate.sources:
        reason = f"version {champion.number} is this run's student: it is the champion already"
        return Decision(decision="unchanged", reason=reason, **about)
    scored = _scored(config, registry, candidate, champion)
    verdict, reason, evidence = decided(scored, config.margin, config.bootstrap, config.force)
    decision = Decision(decision=verdict, reason=reason, evidence=evidence, **about)
    return decision if config.dry_run else _carried_out(registry, candidate, champion, decision)


def _is_folder(name: str | None) -> bool:
    return name is not None and ("/" in name or os.path.isdir(name))  # noqa: PTH112


def _candidate(config: Promote, registry: "Registry") -> "Logged":
    from speechdistill.training.recipe import MSE  # imports torch

    run, parent = str(config.run), ""
    if run.startswith(_BEST_OF):
        parent = run.removeprefix(_BEST_OF)
    elif _is_folder(run):
        of_folder = run_id(run)
        if of_folder is None:
            fix = "give the OUT folder of train-students, or an MLflow run"
            raise PromotionError(f"{run} is not the folder of a run in MLflow", fix)
        run = of_folder
        parent = "" if registry.logged(run) else run
    if parent:
        run = registry.best_of(parent, MSE.metric, MSE.direction)
    models = registry.logged(run)
    if not models:
        raise PromotionError(
            f"run {run} has logged no student",
            "give a run that training has ended, best-of:PARENT, or log a checkpoint with "
            "speechdistill.tracking.registry.log_student",
        )
    return models[0]


def _scored(config: Promote, registry: "Registry", candidate: "Logged", champion: "Version | None") -> Scored:
    """Score all clips with both models; leave out those that either cannot score or was trained on."""
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
            _LOG.warning("%s: %s; neither model is judged by it", uri, error)
    scores = np.array(rows, float).reshape(len(rows), len(models))
    selected = {name: sum(of_model[i] == heard.SELECTED for i in kept) for name, of_model in marks.items()}
    for name, count in selected.items():
        if count:
            _LOG.warning("%d of the %d clips chose the %s's best checkpoint", count, len(kept), name)
    return Scored(
        source=str(config.eval),
        datasets=[datasets[i] for i in kept],
        mos=clips["mos"].to_numpy()[kept],
        candidate=scores[:, 0],
        champion=scores[:, 1] if champion else None,
        excluded=excluded,
        selected_on=selected,
    )


class _Unusable(ValueError):
    """The reason why a clip judges neither model."""


def _mos(model: Teacher, wave: np.ndarray | Exception) -> float:
    if isinstance(wave, UnreadableError):  # perhaps the storage's fault, which must not change the decision
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


def _carried_out(registry: "Registry", candidate: "Logged", champion: "Version | None", decision: Decision) -> Decision:
    """Register the student, store the decision, and move the aliases last: `previous` before `champion`."""
    assert decision.candidate
    version = registry.register(decision.model_name, candidate)
    decision = replace(decision, candidate=replace(decision.candidate, version=version.number))
    registry.document(candidate.run_id, decision.to_json(), f"promotion/{decision.model_name}.json")
    registry.note(version, _tags(decision.to_json()))
    if decision.decision != "promoted":
        return decision
    if registry.by_alias(decision.model_name, CHAMPION) != champion:
        raise PromotionError(f"another promotion has moved {decision.model_name}@{CHAMPION}", "rerun the command")
    if champion:
        registry.point(decision.model_name, PREVIOUS, champion)
    registry.point(decision.model_name, CHAMPION, version)
    return decision


def _tags(decision: dict[str, Any]) -> dict[str, str]:
    """Return the tags of a version for MLflow's own pages; the run's artifact has all of the decision."""
    values: dict[str, Any] = {key: decision[key] for key in ("decision", "reason")}
    values["against_version"] = decision["champion"] and decision["champion"]["number"]
    values["eval"] = decision["clips"]["source"]
    for key in ("mean_pcc", "difference", "rule"):
        values |= {f"{key}.{name}": value for name, value in (decision[key] or {}).items()}
    tables = json.dumps(decision["datasets"], ensure_ascii=False)
    values["datasets"] = tables if len(tables) <= _TAG else "see the run's artifact"
    return {f"promotion.{key}": str(value) for key, value in values.items() if value is not None}


def _rolled_back(config: Promote, registry: "Registry", champion: "Version | None") -> Decision:
    previous = registry.by_alias(config.model_name, PREVIOUS)
    if champion is None:
        raise registry.lacks(config.model_name, CHAMPION)
    if previous is None or previous == champion:
        reason = f"{config.model_name} has no {PREVIOUS} champion at {registry.place}"
        raise PromotionError(reason, "nothing was changed: a second promotion makes one")
    if not config.dry_run:
        registry.point(config.model_name, CHAMPION, previous)
        registry.point(config.model_name, PREVIOUS, champion)
    return Decision(
        decision="rolled_back",
        reason=f"version {previous.number} is the champion again; version {champion.number} is {PREVIOUS}",
        model_name=config.model_name,
        dry_run=config.dry_run,
        champion=previous,
        previous=champion,
    )
