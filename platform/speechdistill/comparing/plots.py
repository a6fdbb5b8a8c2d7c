"""The plots of a comparison, by matplotlib: in the colour of the page, or on white as files."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np

from speechdistill.comparing.candidates import BASELINE, TEACHER, Candidate
from speechdistill.comparing.comparison import Comparison
from speechdistill.io import audio
from speechdistill.metrics.figures import Value

_INK = "#1f2a37"
_COLOURS = (
    "#3b8ed0",
    "#e07b39",
    "#2ca66b",
    "#c85fa8",
    "#8f7fe0",
    "#b8963e",
    "#d1495b",
    "#1fa3a3",
    "#8a8f98",
    "#7da32f",
)
"""Colours that differ on white and on black."""
_MARKERS = "osD^v"
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a model may be called $x$
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "font.size": 9,
    "axes.titlesize": 9,
}
_CSS_PIXELS = 120  # per inch, at most: letters of 9 points are 15 pixels high
_MANY = 400  # points of a figure above which they are drawn as pixels
_RASTER_DPI = 160
_NARROWEST = 0.6  # of a figure's size: a phone scrolls it, so that letters stay readable
_NO_STEP = "(as recorded)"
_SPECTROGRAM = {"nperseg": 512, "noverlap": 352}
_RANGE_DB, _STEP_DB = 80.0, 2.0


def all_plots(comparison: Comparison) -> dict[str, Any]:
    """Return Matplotlib figures by file name, without those that the comparison has no data for."""
    with _styled():
        plots = {"pcc_over_parameters": over_parameters(comparison), "pcc_over_cost": over_cost(comparison)}
        plots |= {f"scatter_{i}": scatter(comparison, model.name) for i, model in enumerate(comparison.models)}
        plots["residuals_by_step"] = by_step(comparison)
    return {name: figure for name, figure in plots.items() if figure is not None}


def over_parameters(comparison: Comparison) -> Any:
    """Plot the paper's Figure 3: weighted mean PCC over parameters, teacher and baselines as lines. None without data.

    Released models and our own of one kind are separate lines.
    """
    known = {model.name: comparison.by_clip.means[model.name]["pcc"].weighted for model in comparison.models}
    if all(value.value is None for value in known.values()):
        return None
    figure, axes = _axes(4.6, 3.3 + _legend_height(len(comparison.models)))
    colours = iter(_COLOURS * len(comparison.models))
    for series, members in _by_series(comparison.models).items():
        points = [(m.parameters, known[m.name]) for m in members if known[m.name].value is not None]
        if series in (TEACHER, BASELINE):
            style = "-" if series == TEACHER else "--"
            for model in (m for m in members if known[m.name].value is not None):
                axes.axhline(known[model.name].value, ls=style, color=next(colours), label=f"{series}: {model.name}")
            continue
        points = sorted(point for point in points if point[0])
        sizes, values = [size for size, _ in points], [value.value for _, value in points]
        bounds = np.array([_bars(value) for _, value in points]).reshape(-1, 2).T
        axes.errorbar(sizes, values, bounds, fmt="o-", capsize=3, color=next(colours), label=series)
    _logarithmic(axes, "parameters")
    _legend(figure)
    return figure


def over_cost(comparison: Comparison) -> Any:
    """Plot the weighted mean PCC over CPU time per second of audio. None if no CPU time is known."""
    points = [(m, comparison.cost[m.name], comparison.by_clip.means[m.name]["pcc"].weighted) for m in comparison.models]
    points = [(model, cost, value) for model, cost, value in points if cost and value.value is not None]
    if not points:
        return None
    figure, axes = _axes(4.6, 3.3 + _legend_height(len(comparison.models)))
    for number, (model, cost, value) in enumerate(points):
        again, colour = divmod(number, len(_COLOURS))
        bounds, look = np.array([_bars(value)]).T, {"fmt": _MARKERS[again % len(_MARKERS)], "color": _COLOURS[colour]}
        axes.errorbar([cost], [value.value], bounds, capsize=3, label=model.name, **look)
    _logarithmic(axes, "CPU ms per second of audio")
    _legend(figure)
    return figure


def scatter(comparison: Comparison, model: str) -> Any:
    """Plot a model's scores over the judge's, in a panel for each dataset."""
    from matplotlib.figure import Figure

    datasets, scores = np.array([clip.dataset for clip in comparison.clips], object), comparison.scores[model]
    columns = min(4, len(comparison.datasets))
    rows, side = -(-len(comparison.datasets) // columns), 1.9 if columns > 1 else 3.0
    figure = Figure(figsize=(side * columns, (side + 0.2) * rows + 0.3), layout="constrained", dpi=_RASTER_DPI)
    panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    for dataset, panel in zip(comparison.datasets, panels, strict=False):
        here = comparison.counts & (datasets == dataset) & np.isfinite(scores)
        mos = np.array([clip.mos for clip in comparison.clips])[here]
        panel.axline((1, 1), slope=1, color=_INK, alpha=0.3, lw=0.8)
        size, is_crowd = 6 if len(mos) > 50 else 16, comparison.counts.sum() > _MANY
        look = {"alpha": 0.7, "color": _COLOURS[0], "lw": 0, "clip_on": False, "rasterized": is_crowd}
        panel.scatter(mos, scores[here], s=size, **look)
        value = comparison.pcc(model, dataset).value
        panel.set(xlim=(0.9, 5.1), ylim=(0.9, 5.1), xticks=(1, 3, 5), yticks=(1, 3, 5))
        panel.set_title(f"{dataset}\nPCC {value:.2f}" if value is not None else f"{dataset}\nno PCC")
    for panel in panels[len(comparison.datasets) :]:
        panel.set_visible(False)
    figure.supxlabel(f"score of {comparison.judged.judge}", fontsize=9)
    figure.supylabel(f"score of {model}", fontsize=9)
    return figure


def by_step(comparison: Comparison) -> Any:
    """Plot medians and quartiles of score less judge's score, by degradation step. None without plans.

    A clip with several steps counts for each.
    """
    members = steps_of(comparison)
    if not members:
        return None
    figure, axes = _axes(
        4.6, 0.8 + 0.16 * len(members) * (1 + len(comparison.models)) + _legend_height(len(comparison.models))
    )
    mos = np.array([clip.mos for clip in comparison.clips])
    for number, (model, colour) in enumerate(zip(comparison.models, _COLOURS * len(comparison.models), strict=False)):
        quartiles = [
            np.quantile((comparison.scores[model.name] - mos)[of_it], [0.25, 0.5, 0.75]) for of_it in members.values()
        ]
        low, middle, high = np.array(quartiles).T
        offset = (number + 1) / (len(comparison.models) + 1) - 0.5
        places, bounds = np.arange(len(members)) + offset, [middle - low, high - middle]
        axes.errorbar(middle, places, xerr=bounds, fmt="o", ms=4, capsize=2, color=colour, label=model.name)
    axes.axvline(0, color=_INK, lw=0.8, alpha=0.5)
    labels = [f"{step} ({len(of_it)})" for step, of_it in members.items()]
    axes.set(xlabel="residual (MOS), median and quartiles")
    axes.set_yticks(range(len(members)), labels)
    axes.invert_yaxis()
    _legend(figure)
    return figure


def steps_of(comparison: Comparison) -> dict[str, np.ndarray]:
    """Return the numbers of the clips that count, by degradation step of their plans; the most frequent first."""
    members: dict[str, list[int]] = {}
    for number, clip in enumerate(comparison.clips):
        if clip.plan and comparison.counts[number]:
            steps = {step["step"] for step in json.loads(clip.plan)["steps"]} or {_NO_STEP}
            for step in steps:
                members.setdefault(step, []).append(number)
    ordered = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
    return {step: np.array(of_it) for step, of_it in ordered}


def spectrogram(wave: np.ndarray) -> bytes:
    """Draw a wave's spectrogram as PNG: time to the right, 0 to 8 kHz upwards, 80 dB below the loudest bin."""
    from matplotlib.image import imsave
    from scipy.signal import stft

    padded = audio.fit(wave, max(len(wave), _SPECTROGRAM["nperseg"]))
    _, _, bins = stft(padded, audio.SAMPLE_RATE, **_SPECTROGRAM)
    decibels = 20 * np.log10(np.abs(bins[:-1]) + 1e-10)
    even = decibels[:, : decibels.shape[1] // 2 * 2]
    halved = even.reshape(len(even) // 2, 2, -1, 2).max(axis=(1, 3))
    halved = _STEP_DB * np.round(halved / _STEP_DB)  # few colours, small file
    image = BytesIO()
    loudest = halved.max()
    imsave(image, halved, vmin=loudest - _RANGE_DB, vmax=loudest, cmap="magma", origin="lower", format="png")
    return image.getvalue()


def png(figure: Any) -> bytes:
    image = BytesIO()
    with _styled():
        figure.savefig(image, format="png", dpi=150, facecolor="white")
    return image.getvalue()


def svg(figure: Any, name: str) -> bytes:
    """Return the figure as an SVG file on white."""
    image = BytesIO()
    with _styled({"svg.hashsalt": name}):
        figure.savefig(image, format="svg", facecolor="white", metadata={"Date": None})
    return image.getvalue()


def inline_svg(figure: Any, name: str) -> str:
    """Return the figure as SVG for a page: without the file's head, as wide as its place, in the page's colour."""
    image = BytesIO()
    with _styled({"svg.hashsalt": name}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    text = image.getvalue().decode()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r">\s+<", "><", text)
    width = figure.get_figwidth() * _CSS_PIXELS
    style = f' style="max-width: {width:.0f}px; min-width: {_NARROWEST * width:.0f}px"'
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf"\1{style}", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    # Identities are unique within one file; a page holds several.
    text = re.sub(r'( id="|"#|url\(#)', rf"\1{name}-", text)
    return text.replace(_INK, "currentColor")


@contextmanager
def _styled(more: Mapping[str, Any] | None = None) -> Iterator[None]:
    import matplotlib as mpl

    with mpl.rc_context({**_STYLE, **(more or {})}):
        yield


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _logarithmic(axes: Any, of: str) -> None:
    """Set a logarithmic axis with plain ticks: powers of ten would be mathematics, which is not parsed here."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    axes.set(xscale="log", xlabel=of, ylabel="PCC, weighted mean")
    low, high = axes.get_xlim()
    if high < 30 * low:  # else the axis may contain no power of ten
        axes.set_xlim(low / 3, high * 3)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _bars(value: Value) -> tuple[float, float]:
    """Return the lengths of the interval below and above the value; percentiles need not contain it."""
    if value.value is None or value.low is None or value.high is None:
        return 0.0, 0.0
    return max(0.0, value.value - value.low), max(0.0, value.high - value.value)


def _legend_height(labels: int) -> float:
    """Return the height of a legend in inches."""
    return 0.2 + 0.18 * -(-labels // 2)


def _legend(figure: Any) -> None:
    figure.legend(loc="outside lower center", ncols=2)


def _by_series(models: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    series: dict[str, list[Candidate]] = {}
    for model in models:
        series.setdefault(model.series, []).append(model)
    return series
