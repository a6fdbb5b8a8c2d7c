"""The result of comparing models: scores, figures of merit, clips without a score, and provenance."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from speechdistill.comparing.candidates import TEACHER, Candidate
from speechdistill.comparing.judged import Judged, JudgedClip
from speechdistill.comparing.scoring import Score, Scores
from speechdistill.data.heard import TRAINED
from speechdistill.metrics import correlation, figures
from speechdistill.metrics.figures import Figures, Value

_TWIN = "a file with the same bytes was rejected"
_UNREAD = "it could not be read when the comparison began; rerun the command"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`scores` by model, shape (clips,), are NaN if missing. `counts` marks the clips that the figures are over.

    `cost` is CPU ms per second of audio by model, None if unknown (on a GPU). `left_out` counts the reasons why clips
    of a dataset are in no figure.
    """

    judged: Judged
    models: list[Candidate]
    rows: list[dict[str, Any]]
    scores: dict[str, np.ndarray]
    counts: np.ndarray
    by_clip: Figures
    by_system: Figures
    differences: dict[tuple[str, str], correlation.Difference]
    cost: dict[str, float | None]
    left_out: dict[str, Counter[str]]
    about: dict[str, Any]

    @property
    def clips(self) -> list[JudgedClip]:
        return self.judged.clips

    @property
    def datasets(self) -> list[str]:
        return list(self.by_clip.clips)

    @property
    def whole(self) -> list[str]:
        """The models that have a PCC on each dataset for which any model has one: their means are comparable."""
        return _whole(self.by_clip)

    @property
    def heard(self) -> dict[str, Counter[str]]:
        """The numbers of clips that models were trained or selected on, for those with any."""
        known = {model.name: self.judged.known_to(model.provenance) for model in self.models}
        return {name: counts for name, counts in known.items() if counts}

    def pcc(self, model: str, dataset: str) -> Value:
        return self.by_clip.values[model][dataset]["pcc"]

    def best(self, dataset: str | None, plain: bool = False) -> str | None:
        """Return the model that leads on a dataset, or in a mean over all of them, by more than chance; else None.

        The lead in the weighted mean is that of the paired bootstrap; elsewhere each of two intervals must exclude the
        other model's value. A teacher that is the judge itself never leads, nor does a model that was trained on some
        of the clips.
        """
        values = {}
        for model in self.models:
            mean = self.by_clip.means[model.name]["pcc"]
            value = self.pcc(model.name, dataset) if dataset else mean.plain if plain else mean.weighted
            is_judge = model.sha256 == self.judged.teacher
            is_whole = dataset is not None or model.name in self.whole
            if value.value is not None and is_whole and not is_judge and not self._was_trained(model.name):
                values[model.name] = value
        if len(values) < 2:
            return None
        first, *others = sorted(values, key=lambda name: values[name].value or 0.0, reverse=True)
        if dataset is None and not plain:
            leads = all(self._leads(first, other) for other in others)
        else:
            leads = all(_excludes(values[first], values[other]) for other in others)
        return first if leads else None

    def _was_trained(self, model: str) -> bool:
        return self.heard.get(model, Counter())[TRAINED] > 0

    def _leads(self, model: str, other: str) -> bool:
        if difference := self.differences.get((model, other)):
            return difference.low > 0
        difference = self.differences.get((other, model))
        return difference is not None and difference.high < 0


def _excludes(above: Value, below: Value) -> bool:
    """Whether the interval of each value excludes the other value."""
    if above.value is None or below.value is None or above.low is None or below.high is None:
        return False
    return above.low > below.value and below.high < above.value


def compared(
    judged: Judged, models: Sequence[Candidate], answered: Scores, resamples: int, seed: int, about: Mapping[str, Any]
) -> Comparison:
    """Compute the figures of models from their scores."""
    clips = judged.clips
    models = [model._replace(series=TEACHER) if model.sha256 == judged.teacher else model for model in models]
    answers = {model.name: [answered.scores.get((model.key, clip.sha256)) for clip in clips] for model in models}
    scores = {name: _array([one and one.score for one in column]) for name, column in answers.items()}
    datasets = np.array([clip.dataset for clip in clips], object)
    mos = np.array([clip.mos for clip in clips], float)
    counts = figures.counted(datasets, mos, scores)
    kept = {name: values[counts] for name, values in scores.items()}
    of_clips = (datasets[counts], mos[counts], kept)
    by_clip = figures.compute(*of_clips, resamples, seed)
    whole = {name: kept[name] for name in _whole(by_clip)}
    systems = [clip.system for clip, counts_here in zip(clips, counts, strict=True) if counts_here]
    rows = [
        _row(clip, model, answers[model.name][i], answered.rejects) for i, clip in enumerate(clips) for model in models
    ]
    return Comparison(
        judged=judged,
        models=models,
        rows=rows,
        scores=scores,
        counts=counts,
        by_clip=by_clip,
        by_system=figures.compute(*figures.by_system(of_clips[0], systems, *of_clips[1:]), resamples, seed),
        differences=correlation.compare_all(of_clips[0], of_clips[1], whole, resamples, seed),
        cost={name: _cost(column) for name, column in answers.items()},
        left_out=_left_out(rows, clips, counts, len(models)),
        about=dict(about),
    )


def _row(clip: JudgedClip, model: Candidate, answer: Score | None, rejects: Mapping[str, str]) -> dict[str, Any]:
    """Return a row of the schema `score.v1`."""
    error = answer.error if answer else rejects.get(clip.uri, _TWIN if clip.sha256 else _UNREAD)
    return {
        "model": model.name,
        "model_sha256": model.sha256,
        "clip_id": clip.clip_id,
        "clip_sha256": clip.sha256,
        "uri": clip.uri,
        "dataset": clip.dataset,
        "system": clip.system,
        "mos": clip.mos,
        "score": answer and answer.score,
        "error": error,
        "duration_s": answer and answer.duration_s,
        "cpu_s": answer and answer.cpu_s,
        "plan": clip.plan,
    }


def _left_out(
    rows: Sequence[Mapping[str, Any]], clips: Sequence[JudgedClip], counts: np.ndarray, num_models: int
) -> dict[str, Counter[str]]:
    left_out: dict[str, Counter[str]] = {}
    for number in np.flatnonzero(~counts).tolist():
        of_clip = rows[number * num_models : (number + 1) * num_models]
        reason = next(row["error"] for row in of_clip if row["error"])
        left_out.setdefault(clips[number].dataset, Counter())[reason] += 1
    return left_out


def _whole(figures: Figures) -> list[str]:
    there = {
        model: {name for name, values in of_model.items() if values["pcc"].value is not None}
        for model, of_model in figures.values.items()
    }
    most = set().union(*there.values())
    return [model for model, names in there.items() if names and names == most]


def _cost(answers: Sequence[Score | None]) -> float | None:
    there = [(one.cpu_s, one.duration_s) for one in answers if one and one.cpu_s is not None and one.score is not None]
    return 1e3 * sum(cpu_s for cpu_s, _ in there) / sum(s for _, s in there) if there else None


def _array(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if value is None else value for value in values], float)
