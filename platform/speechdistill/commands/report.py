"""What jobs ended with, as text for a terminal."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from speechdistill.engine.cost import Estimate


_PARTS = ("validation", "test")


def labels(summary: dict[str, Any], out: str) -> str:
    histogram = summary["score_histogram"]
    session = (
        f"this session: {summary['session_samples']:,} samples in {summary['session_s']:.0f} s, "
        f"{summary['session_audio_hours_per_hour']:.1f} hours of audio per hour"
    )
    lines = [
        f"labelled {summary['labelled']:,} samples ({summary['hours']:.2f} h), rejected {summary['rejected']:,}",
        session if summary["session_samples"] else "all of it in earlier sessions; nothing was left to do",
    ]
    if summary["labelled"]:
        lines += [f"mean score {summary['score_mean']:.2f}; histogram (MOS, samples):", *_bars(histogram)]
    lines += [f"  {count} × {reason}" for reason, count in summary["reject_reasons"].items()]
    if not summary["complete"]:
        return "\n".join(
            [
                *lines,
                f"Reached --max-hours: {summary['num_samples']:,} of {summary['wanted']:,} samples are in {out}; "
                "the same command goes on from there",
            ]
        )
    return "\n".join([*lines, f"shards, manifest.parquet and summary.json are in {out}"])


def held_out(shards: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines on the samples that training leaves out of each label run, from `shards` of a provenance."""
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


def students(rows: list[dict[str, Any]]) -> str:
    lines = ["variant    parameters  trainable   PCC     MSE     best step  steps     time  state   MLflow run"]
    for row in rows:
        pcc, mse = (f"{row[key]:.4f}" if row[key] is not None else "–" for key in ("pcc", "mse"))
        best_step, run = row["best_step"] or "–", row["run_id"] or "–"
        sizes = f"{row['parameters']:>10,} {row['trainable']:>10,}"
        lines.append(
            f"{row['variant']:<10} {sizes}   {pcc:<7} {mse:<7} {best_step:>9} {row['steps']:>6,} "
            f"{row['train_s']:>6.0f} s  {row['state']:<7} {run}"
        )
        lines += [f"  {row['error']}"] if row["error"] else []
    lines += [f"best of {row['variant']}: {row['folder']}" for row in rows if row["folder"]]
    return "\n".join(lines)


def pruned(rows: list[dict[str, Any]]) -> str:
    on_gpu = "cuda_s" in rows[0]
    gpu = "  GPU time" if on_gpu else ""
    version = "     version" if "version" in rows[0] else ""
    lines = [f"checkpoint       remaining      nonzero   parameters       MB  CPU time{gpu}   MSE     PCC{version}"]
    for row in rows:
        times = "  ".join(f"{row[key]:8.2f}" for key in ("cpu_s", "cuda_s") if key in row)
        pcc = f"{row['pcc']:.4f}" if row["pcc"] is not None else "–"
        lines.append(
            f"{row['name']:<16} {row['remaining']:>9.3f} {row['nonzero']:>12,} {row['parameters']:>12,} "
            f"{row['size_mb']:>8.1f}  {times}   {row['mse']:.4f}  {pcc:<6}"
            + (f"  {row['version']:>8}" if "version" in row else "")
        )
    folder = rows[-1]["folder"].rpartition("/")[0]
    return "\n".join([*lines, "times are those of the unpruned teacher's for the same audio", f"they are in {folder}"])


def estimate(figures: "Estimate", price: str | None) -> str:
    lines = [
        f"{figures.num_samples:,} samples take about (from {figures.trial_samples} of them, "
        f"{figures.trial_rejected} rejected; start-up apart):",
        f"  CPU     {figures.cpu_hours:,.2f} h",
        f"  GPU     {figures.gpu_hours:,.2f} h",
        f"  output  {figures.output_gb:,.3f} GB",
        f"  time    {figures.hours:,.2f} h on these pools",
    ]
    if figures.money is not None:
        lines.append(f"  money   {figures.money:,.2f}, where all that is paid for is at work")
    elif price:
        lines.append(f"  money   not known: --price {price} does not name all of the above")
    return "\n".join([*lines, "nothing was written"])


def _bars(histogram: dict[str, list[float]], width: int = 50) -> list[str]:
    """The forty bins of the histogram as eight rows of text."""
    sizes = [sum(histogram["counts"][i : i + 5]) for i in range(0, 40, 5)]
    edges = histogram["edges"][::5]
    scale = width / max(sizes)
    return [f"  {edges[i]:.1f}–{edges[i + 1]:.1f} {n:7.0f} {'█' * round(n * scale)}" for i, n in enumerate(sizes)]


def counts(values: dict[str, int]) -> str:
    return ", ".join(f"{name} × {count}" for name, count in Counter(values).most_common(5))


def changes(of_known: dict[str, int]) -> list[str]:
    """Lines on the clips of the manifest that an ingest found changed, unusable or unreadable."""
    columns = {name: n for name, n in of_known.items() if name not in ("updated", "rejected", "unreadable")}
    lines = {
        "updated": f"updated: {counts(columns)}",
        "rejected": "in the manifest and cannot be used any more",
        "unreadable": "in the manifest and could not be read now, and stay as they were",
    }
    numbers = ((of_known.get(name, 0), text) for name, text in lines.items())
    return [f"{n:,} {'clip was' if n == 1 else 'clips were'} {text}" for n, text in numbers if n]
