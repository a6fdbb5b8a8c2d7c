"""Results of commands as text for a terminal."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from speechdistill.commands.results import Kept, LabelSummary
from speechdistill.comparing.tables import as_text, number

if TYPE_CHECKING:  # these import ray and torch
    from speechdistill.engine.cost import Estimate
    from speechdistill.training.launch import TrainedRun

_PARTS = ("validation", "test")
_CHANGES = ("updated", "rejected", "unreadable")


def labels(summary: LabelSummary, out: str) -> str:
    session = (
        f"this session: {summary.session_samples:,} samples in {summary.session_s:.0f} s, "
        f"{summary.session_audio_hours_per_hour:.1f} hours of audio per hour"
    )
    lines = [
        f"labelled {summary.labelled:,} samples ({duration(summary.hours)}), rejected {summary.rejected:,}",
        session if summary.session_samples else "earlier sessions labelled all of them; nothing was left to do",
    ]
    if summary.labelled:
        lines += [f"mean score {summary.score_mean:.2f}; histogram (MOS, samples):", *_bars(summary.score_histogram)]
    lines += [f"  {count} × {reason}" for reason, count in summary.reject_reasons.items()]
    if not summary.complete:
        done = f"Reached --max-hours: {summary.num_samples:,} of {summary.wanted:,} samples are in {out}"
        return "\n".join([*lines, f"{done}; the same command resumes"])
    see = f"see samples with: speechdistill shards head {out}"
    return "\n".join([*lines, f"shards, manifest.parquet and summary.json are in {out}", see])


def held_out(shards: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines on the samples that training leaves out of each label run, from `shards` of a provenance."""
    lines = []
    for held in (one["held_out"] for one in shards if one.get("held_out")):
        if "too_few" in held:
            lines.append(f"held out of the shards: nothing ({held['too_few']})")
            continue
        best, judges = (f"{held[part]['samples']:,} samples of {held[part]['clips']:,} clips" for part in _PARTS)
        lines.append(
            f"held out of the shards, by {held['by']}: {best} to choose the best, {judges} for `compare --clips`"
        )
    return lines


def trained(runs: Sequence["TrainedRun"]) -> str:
    """A row per run, errors, the folders of the best checkpoints, and the scale of the figures."""
    header = ("variant", "parameters", "trainable", "PCC", "clips", "MSE", "best step", "steps", "time", "state")
    rows = [[*header, "MLflow run"], *map(_trained, runs)]
    lines = [as_text(rows), f"PCC and MSE are of the best checkpoint on the validation clips, {runs[0].scale}"]
    lines += [f"{run.variant} failed: {run.error}" for run in runs if run.error]
    return "\n".join([*lines, *(f"best of {run.variant}: {run.folder}" for run in runs if run.folder)])


def _trained(run: "TrainedRun") -> list[str]:
    sizes = [f"{run.parameters:,}", f"{run.trainable:,}"]
    figures = [number(run.pcc, 4), f"{run.clips:,}" if run.clips else "–", number(run.mse, 4)]
    progress = [f"{run.best_step or '–'}", f"{run.steps:,}", f"{run.train_s:.0f} s", run.state, run.run_id or "–"]
    return [run.variant, *sizes, *figures, *progress]


def pruned(checkpoints: Sequence[Kept], clips: int) -> str:
    """A row per checkpoint, the scale of the figures, and the folder of all of them."""
    header = ["checkpoint", "remaining", "nonzero", "parameters", "MB", "CPU time", "GPU time", "MSE", "PCC", "version"]
    rows = [header, *map(_pruned, checkpoints)]
    empty = {header[i] for i, column in enumerate(zip(*rows[1:], strict=True)) if set(column) == {""}}
    shown = [[word for word, name in zip(row, header, strict=True) if name not in empty] for row in rows]
    figures = f"MSE and PCC are on {clips:,} validation clips, on the teacher's universal scale"
    times = "CPU time is relative to the unpruned teacher on the same audio"
    folder = checkpoints[-1].folder.rpartition("/")[0]
    return "\n".join([as_text(shown), figures, times, f"Checkpoints: {folder}"])


def _pruned(one: Kept) -> list[str]:
    sizes = [f"{one.remaining:.3f}", f"{one.nonzero:,}", f"{one.parameters:,}", f"{one.size_mb:.1f}"]
    times = [f"{one.cpu_s:.2f}", "" if one.cuda_s is None else f"{one.cuda_s:.2f}"]
    return [one.name, *sizes, *times, number(one.mse, 4), number(one.pcc, 4), one.version or ""]


def estimate(figures: "Estimate", price: str | None) -> str:
    lines = [
        f"{figures.num_samples:,} samples take about (from {figures.trial_samples} of them, "
        f"{figures.trial_rejected} rejected; without start-up):",
        f"  CPU     {duration(figures.cpu_hours)}",
        f"  GPU     {duration(figures.gpu_hours)}",
        f"  output  {_size(figures.output_gb)}",
        f"  time    {duration(figures.hours)} on these pools",
    ]
    if figures.money is not None:
        lines.append(f"  money   {_amount(figures.money)}, if all that is paid for is busy")
    elif price:
        lines.append(f"  money   unknown: --price {price} does not name all of the above")
    return "\n".join([*lines, "nothing was written"])


def duration(hours: float) -> str:
    """Hours as text, below one hour minutes or seconds."""
    seconds = 3600 * hours
    if seconds == 0:
        return "0 s"
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if hours < 1 else f"{hours:,.2f} h"


def _size(gigabytes: float) -> str:
    return f"{gigabytes:,.2f} GB" if gigabytes >= 1 else f"{1e3 * gigabytes:.3g} MB"


def _amount(money: float) -> str:
    return f"{money:,.2f}" if money >= 0.1 or not money else f"{money:.2g}"


def _bars(histogram: Mapping[str, Sequence[float]], width: int = 50) -> list[str]:
    """The forty bins of the histogram as eight rows of text."""
    sizes = [sum(histogram["counts"][i : i + 5]) for i in range(0, 40, 5)]
    edges = histogram["edges"][::5]
    scale = width / max(sizes)
    return [f"  {edges[i]:.1f}–{edges[i + 1]:.1f} {n:7.0f} {'█' * round(n * scale)}" for i, n in enumerate(sizes)]


def counts(values: Mapping[str, int]) -> str:
    return ", ".join(f"{name} × {count}" for name, count in Counter(values).most_common(5))


def changes(of_known: Mapping[str, int]) -> list[str]:
    """Return lines on the clips of the manifest that an ingest found changed, unusable or unreadable."""
    columns = {name: n for name, n in of_known.items() if name not in _CHANGES}
    lines = {
        "updated": f"updated: {counts(columns)}",
        "rejected": "in the manifest and cannot be used any more",
        "unreadable": "in the manifest and could not be read now, and stay as they were",
    }
    numbers = ((of_known.get(name, 0), text) for name, text in lines.items())
    return [f"{n:,} {'clip was' if n == 1 else 'clips were'} {text}" for n, text in numbers if n]
