"""The decision of a promotion: whether a student follows listeners better than the champion does.

The rule: on the same clips, the mean over datasets of the PCC, weighted by clips, must exceed the champion's by at
least `margin`, and the lower bound of the difference's 95% bootstrap interval must be above 0
(`metrics/correlation.py`). If there is no champion, the student becomes it if its own mean is at least 0.3.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np

from speechdistill.commands.resampling import Bootstrap
from speechdistill.io.errors import UserError
from speechdistill.metrics import correlation
from speechdistill.metrics.correlation import Difference

if TYPE_CHECKING:
    from speechdistill.tracking.registry import Logged, Version

_FIRST_PCC = 0.3  # below it, a first champion follows listeners hardly better than chance on a few clips

Verdict = Literal["promoted", "kept", "unchanged", "rolled_back"]


class PromotionError(UserError):
    """A promotion that cannot be decided: the reason, and what to do."""


class Scored(NamedTuple):
    """The clips that both models could score; arrays of shape (clips,).

    `excluded` has uri and reason of the other clips, `selected_on` by model the number of clips that chose its best
    checkpoint.
    """

    source: str
    datasets: list[str]
    mos: np.ndarray
    candidate: np.ndarray
    champion: np.ndarray | None
    excluded: list[dict[str, str]]
    selected_on: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        counts = {"source": self.source, "scored": len(self.datasets)}
        return {**counts, "excluded": self.excluded, "selected_on": self.selected_on}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """The student of a run; `version` is its number once it is registered."""

    run_id: str
    model: str
    tags: Mapping[str, str]
    version: str | None = None

    @classmethod
    def of(cls, logged: "Logged") -> Self:
        return cls(run_id=logged.run_id, model=logged.uri, tags=logged.tags)

    def to_json(self) -> dict[str, Any]:
        version = {"version": self.version} if self.version is not None else {}
        return {"run_id": self.run_id, "model": self.model, "tags": dict(self.tags), **version}


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The figures of a decision: mean PCC by model, PCC by dataset (a row each), and the difference, if any."""

    difference: Difference | None
    rule: Mapping[str, Any]
    mean_pcc: Mapping[str, float | None]
    datasets: Sequence[Mapping[str, Any]]
    clips: Scored


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The outcome of `promote`.

    `promoted`; `kept`: the old champion stays, or there is still none; `unchanged`: the student is the champion
    already; `rolled_back`: `champion` and `previous` were swapped.
    """

    decision: Verdict
    reason: str
    model_name: str
    dry_run: bool
    champion: "Version | None"
    candidate: Contender | None = None
    previous: "Version | None" = None
    evidence: Evidence | None = None

    def to_json(self) -> dict[str, Any]:
        values: dict[str, Any] = {"decision": self.decision, "reason": self.reason}
        if shown := self.evidence:
            values["difference"] = shown.difference and shown.difference._asdict()
            values |= {"rule": dict(shown.rule), "mean_pcc": dict(shown.mean_pcc), "datasets": list(shown.datasets)}
        values |= {"model_name": self.model_name, "dry_run": self.dry_run}
        if self.candidate:
            values["candidate"] = self.candidate.to_json()
        values["champion"] = self.champion and self.champion._asdict()
        if self.previous:
            values["previous"] = self.previous._asdict()
        return values | ({"clips": shown.clips.to_json()} if shown else {})


def decided(scored: Scored, margin: float, bootstrap: Bootstrap, force: bool) -> tuple[Verdict, str, Evidence]:
    """Return verdict, reason and evidence; raises `PromotionError` if no dataset has enough clips.

    `force` promotes a first champion whatever its PCC.
    """
    models = {"candidate": scored.candidate}
    if scored.champion is not None:
        models["champion"] = scored.champion
    means = {name: correlation.mean_pcc(scored.datasets, scored.mos, values) for name, values in models.items()}
    if means["candidate"] is None:
        first = f", the first because {scored.excluded[0]['reason']}" if scored.excluded else ""
        raise PromotionError(
            f"{scored.source}: no dataset has {correlation.MIN_CLIPS} scored clips with different mos "
            f"({len(scored.datasets)} clips were scored, {len(scored.excluded)} could not be{first})",
            "give more clips",
        )
    difference = None
    if scored.champion is None:
        verdict, reason = _first(means["candidate"], force)
    else:
        versus = (scored.datasets, scored.mos, scored.candidate, scored.champion)
        difference = correlation.compare(*versus, bootstrap.resamples, bootstrap.seed)
        assert difference is not None  # like the means, it depends on the listeners alone
        verdict, reason = _against(difference, margin)
    rule = {"margin": margin, "confidence": correlation.CONFIDENCE}
    return (
        verdict,
        reason,
        Evidence(
            difference=difference,
            rule={**rule, "resamples": bootstrap.resamples, "seed": bootstrap.seed},
            mean_pcc=means,
            datasets=correlation.by_dataset(scored.datasets, scored.mos, models),
            clips=scored,
        ),
    )


def _first(pcc: float, force: bool) -> tuple[Verdict, str]:
    """Decide without a champion."""
    if pcc >= _FIRST_PCC or force:
        return "promoted", "there is no champion yet"
    reason = f"there is no champion yet, but the student's mean PCC is {pcc:.4f}, below {_FIRST_PCC}"
    return "kept", f"{reason}; give --force to promote it"


def _against(difference: Difference, margin: float) -> tuple[Verdict, str]:
    """Decide against a champion."""
    interval = f"{difference.low:+.4f}..{difference.high:+.4f}"
    reason = f"the student's mean PCC less the champion's is {difference.value:+.4f} ({interval})"
    if difference.value < margin:
        return "kept", f"{reason}; the margin is {margin:+.4f}"
    if difference.low <= 0:
        return "kept", f"{reason}; the interval must lie above 0: more clips narrow it"
    return "promoted", reason
