"""A comparison as tables: Table I in Markdown and CSV, all figures as rows, and our results beside the paper's."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from speechdistill.comparing import paper
from speechdistill.metrics.figures import METRICS, Value, means

if TYPE_CHECKING:  # its modules import ray, which tables do not need
    from speechdistill.comparing.comparison import Comparison

_NONE = "–"
_REASONS = 5  # of a dataset


def table_one(comparison: "Comparison") -> list[list[str]]:
    """Return datasets as columns, the two means last, and models as rows, below a header and the numbers of clips."""
    header = ["model", "parameters", "CPU ms/s", *comparison.datasets, "weighted", "unweighted"]
    clips = ["clips", "", "", *map(str, comparison.by_clip.clips.values()), "", ""]
    rows = []
    for model in comparison.models:
        mean, cost = comparison.by_clip.means[model.name]["pcc"], comparison.cost[model.name]
        about = [model.name, count(model.parameters), number(cost, 1)]
        values = [comparison.pcc(model.name, dataset) for dataset in comparison.datasets]
        rows.append([*about, *(cell(value) for value in [*values, mean.weighted, mean.plain])])
    return [header, clips, *rows]


def markdown(comparison: "Comparison") -> str:
    """Return Table I, the reasons of its gaps, and the differences of the weighted mean, as Markdown."""
    lines = [f"PCC with {comparison.judged.judge}, by dataset; intervals and further figures are in metrics.csv.", ""]
    lines += _markdown(table_one(comparison))
    missing = gaps(comparison)
    lines += ["", f"{_NONE} stands for:", *(f"- {line}" for line in missing)] if missing else []
    lines += ["", *(f"- {line}" for line in heard(comparison))] if heard(comparison) else []
    absent = left_out(comparison)
    lines += ["", "Clips in no figure:", *(f"- {line}" for line in absent)] if absent else []
    if comparison.differences:
        lines += ["", "Differences of the weighted mean, with 95% intervals of a bootstrap over clips:", ""]
        lines += _markdown(pairs(comparison))
    return "\n".join([*lines, ""])


def gaps(comparison: "Comparison") -> list[str]:
    """Return the reasons why datasets have no PCC, with the models unless all of them have none."""
    why: dict[tuple[str, str], list[str]] = {}
    for model, of_model in comparison.by_clip.values.items():
        for dataset, values in of_model.items():
            if values["pcc"].value is None:
                why.setdefault((dataset, values["pcc"].why), []).append(model)
    models = {
        key: "" if len(names) == len(comparison.models) else f" ({', '.join(names)})" for key, names in why.items()
    }
    return [f"{dataset}: {reason}{models[dataset, reason]}" for dataset, reason in sorted(why)]


def left_out(comparison: "Comparison") -> list[str]:
    """Return the reasons why clips are in no figure: the most frequent of each dataset (a reason may name a file)."""
    lines = []
    for dataset, reasons in comparison.left_out.items():
        lines += [f"{dataset}: {number} × {reason}" for reason, number in reasons.most_common(_REASONS)]
        if len(reasons) > _REASONS:
            lines.append(f"{dataset}: {len(reasons) - _REASONS} further reasons; see scores.parquet")
    return lines


def heard(comparison: "Comparison") -> list[str]:
    """Return the models that were trained or selected on some of the clips, and on how many."""
    return [
        f"{name} was {how} {count} of the {len(comparison.clips)} clips: its figures are too good"
        for name, counts in comparison.heard.items()
        for how, count in counts.items()
    ]


def pairs(comparison: "Comparison") -> list[list[str]]:
    """Return a row for every two models that have all figures: the difference of their weighted means with interval."""
    rows = [["model", "less model", "difference", "interval", "more than chance"]]
    for (one, other), by in comparison.differences.items():
        is_real = "yes" if by.low > 0 or by.high < 0 else "no"
        rows.append([one, other, f"{by.value:+.3f}", f"{by.low:+.3f} to {by.high:+.3f}", is_real])
    return rows


def long(comparison: "Comparison") -> list[list[Any]]:
    """Return a row per level (clip, system), dataset or mean, model and metric, with interval or reason of none."""
    rows: list[list[Any]] = [["level", "dataset", "clips", "model", "metric", "value", "low", "high", "why_none"]]
    for level, figures in (("clip", comparison.by_clip), ("system", comparison.by_system)):
        for model, of_model in figures.values.items():
            for dataset, values in of_model.items():
                for metric in METRICS:
                    rows.append([level, dataset, figures.clips[dataset], model, metric, *_fields(values[metric])])
            for metric, mean in figures.means[model].items():
                clips = sum(figures.clips.values())
                rows.append([level, "weighted mean", clips, model, metric, *_fields(mean.weighted)])
                rows.append([level, "unweighted mean", clips, model, metric, *_fields(mean.plain)])
    return rows


def beside_paper(comparison: "Comparison") -> list[list[str]]:
    """Return our PCC, the paper's and the difference, for models and datasets that the paper's Table I has.

    Means are over the datasets for which both sides have a figure, weighted by the clips of each side, and so differ
    from the paper's own.
    """
    pairs = [(name, theirs) for name in comparison.datasets if (theirs := paper.dataset_of(name))]
    rows = [["model", "", *(ours for ours, _ in pairs), "weighted", "unweighted"]]
    if not pairs:
        return rows
    clips = [comparison.by_clip.clips[ours] for ours, _ in pairs], [paper.clips()[theirs] for _, theirs in pairs]
    for model in comparison.models:
        if not (of_paper := paper.row_of(model.name) or paper.row_of(model.address)):
            continue
        mine = [comparison.pcc(model.name, name).value for name, _ in pairs]
        published = [paper.rows()[of_paper].pcc[theirs] for _, theirs in pairs]
        shared = [a is not None and b is not None for a, b in zip(mine, published, strict=True)]
        both = _with_means(clips[0], mine, shared), _with_means(clips[1], published, shared)
        gaps = [a - b if a is not None and b is not None else None for a, b in zip(*both, strict=True)]
        rows.append([model.name, "ours", *map(number, both[0])])
        rows.append([of_paper, "paper", *map(number, both[1])])
        rows.append(["", "difference", *(f"{gap:+.2f}" if gap is not None else _NONE for gap in gaps)])
    return rows


def as_csv(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode("utf-8", "backslashreplace")


def as_text(rows: Sequence[Sequence[str]]) -> str:
    """Return rows for a terminal: the first column aligned left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(line).rstrip() for line in lines)


def cell(value: Value) -> str:
    return number(value.value)


def interval(value: Value) -> str:
    """Return the interval in words, or the reason of a missing figure; empty for a figure without an interval."""
    if value.value is None:
        return value.why
    return f"95% interval {value.low:.3f} to {value.high:.3f}" if value.low is not None else ""


def _with_means(clips: Sequence[int], values: Sequence[float | None], shared: Sequence[bool]) -> list[float | None]:
    kept = [value if is_shared else None for value, is_shared in zip(values, shared, strict=True)]
    return [*values, *means(clips, kept)]


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *others = (
        f"| {' | '.join(word.replace('|', chr(92) + '|').replace(chr(10), ' ') for word in row)} |" for row in rows
    )
    return [header, f"|{'---|' * len(rows[0])}", *others]


def _fields(value: Value) -> list[Any]:
    return [value.value, value.low, value.high, value.why]


def number(value: float | None, digits: int = 2) -> str:
    return f"{value:.{digits}f}" if value is not None else _NONE


def count(parameters: int | None) -> str:
    if parameters is None:
        return _NONE
    return f"{parameters / 1e6:.2f} M" if parameters >= 1e5 else f"{parameters / 1e3:.0f} k"
