"""Results of commands as types, which reports print; files get them as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class IngestSummary:
    """The content of `ingest.json`. `hours` and `clips` are by kind of clip.

    `changes` counts known clips by what became of them, `lists` the rows of lists. `without_speaker` counts files that
    --speaker-from did not match; None without that option.
    """

    clips: Mapping[str, int]
    hours: Mapping[str, float]
    rejected: int
    manifest: str
    changes: Mapping[str, int]
    ignored_extensions: Mapping[str, int]
    lists: Mapping[str, int]
    without_speaker: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name != "without_speaker" or value is not None}


@dataclass(frozen=True, kw_only=True)
class LabelSummary:
    """The content of a label run's `summary.json`; `session_*` describe the session that ended.

    `score_histogram` has `edges` and `counts`. `complete` and `wanted` are not in the file: an incomplete run has made
    `num_samples` of the `wanted` samples.
    """

    num_samples: int
    labelled: int
    rejected: int
    hours: float
    score_mean: float | None
    score_histogram: Mapping[str, list[float]]
    reject_reasons: Mapping[str, int]
    session_s: float
    session_samples: int
    session_samples_per_s: float
    session_audio_hours_per_hour: float
    recipe: str
    teacher: str
    seed: int
    finished_at: str
    fingerprint: str
    complete: bool
    wanted: int

    def to_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if name not in ("complete", "wanted")}


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A checkpoint that a pruning run has kept.

    `remaining` is the share of weights (or heads and neurons) that is left. `cpu_s` and `cuda_s` are the times of
    scoring, as shares of the unpruned teacher's. `version` is the checkpoint's version in MLflow's registry.
    """

    name: str
    remaining: float
    nonzero: int
    parameters: int
    size_mb: float
    cpu_s: float
    mse: float
    pcc: float | None
    folder: str
    cuda_s: float | None = None
    version: str | None = None

    def to_json(self) -> dict[str, Any]:
        optional = ("cuda_s", "version")
        return {name: value for name, value in asdict(self).items() if name not in optional or value is not None}
