"""Figures of a label run: of each part, of this session, during the run and at its end."""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from speechdistill.engine import shards
from speechdistill.engine.footers import Part
from speechdistill.engine.shards import Totals
from speechdistill.io import audio

SCORE_EDGES = np.linspace(1.0, 5.0, 41)


def of_part(rows: pa.Table) -> dict[str, Any]:
    """Return the figures that are summed over parts (`shards.Layout`): seconds, scores and their histogram."""
    scores = rows["score"].to_numpy()
    return {
        "audio_s": float(np.sum(rows["num_samples"].to_numpy()) / audio.SAMPLE_RATE),
        "score_sum": float(np.sum(scores)),
        "score_counts": np.histogram(scores, SCORE_EDGES)[0].tolist(),
    }


class Session:
    """Output and speed of this process, without the earlier sessions of a resumed run."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self.samples, self._audio_s = 0, 0.0

    def add(self, part: Part) -> None:
        self.samples += part.num_ids
        self._audio_s += part.totals["audio_s"]

    def count(self, samples: int) -> None:
        """Correct the number of samples of a stopped run, which may have committed parts without `add`."""
        self._audio_s *= max(1.0, samples / max(1, self.samples))
        self.samples = max(self.samples, samples)

    def throughput(self) -> dict[str, float]:
        seconds = time.monotonic() - self._started
        return {
            "session_s": seconds,
            "session_samples": self.samples,
            "session_samples_per_s": self.samples / seconds,
            "session_audio_hours_per_hour": self._audio_s / seconds,
        }


def live(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the monitor's figures, with the speed in hours of audio."""
    audio_s = {"audio_hours_per_s": figures["per_s/audio_s"] / 3600} if "per_s/audio_s" in figures else {}
    return {**{key: value for key, value in figures.items() if not key.startswith("per_s/")}, **audio_s}


def summary(out: str, totals: Totals, session: Session) -> dict[str, Any]:
    """Return the figures of `summary.json`, so far if the run is not complete."""
    counts = totals.sums.get("score_counts")
    return {
        "num_samples": totals.done,
        "labelled": totals.labelled,
        "rejected": totals.rejected,
        "hours": totals.sums.get("audio_s", 0.0) / 3600,
        "score_mean": totals.sums["score_sum"] / totals.labelled if totals.labelled else None,
        "score_histogram": {"edges": SCORE_EDGES.round(3).tolist(), "counts": counts or [0] * (len(SCORE_EDGES) - 1)},
        "reject_reasons": dict(shards.reject_reasons(out).most_common(10)),
        **session.throughput(),
    }


def histogram(summary: Mapping[str, Any]) -> Any:
    """Draw the histogram of scores as a matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.stairs(summary["score_histogram"]["counts"], summary["score_histogram"]["edges"], fill=True)
    axes.set(xlabel="score (MOS)", ylabel="samples", xlim=(1, 5))
    mean = f", mean {summary['score_mean']:.2f}" if summary["labelled"] else ""
    axes.set_title(f"{summary['labelled']:,} samples, {summary['hours']:.2f} h{mean}")
    return figure
