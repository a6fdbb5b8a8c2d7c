"""The plots of a comparison, by matplotlib: for the page they take the page's colour, as files they stand on white."""

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
"""They can be told from each other on white and on black."""
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
_CSS_PIXELS = 120  # of an inch at most: letters of 9 points are 15 pixels high then
_MANY = 400  # points of a figure that are drawn as pixels
_RASTER_DPI = 160
_NARROWEST = 0.6  # of a figure's size: on a phone it is scrolled then, and letters can be read
_NO_STEP = "(as recorded)"
_SPECTROGRAM = {"nperseg": 512, "noverlap": 352}
_RANGE_DB, _STEP_DB = 80.0, 2.0


def all_plots(found: Comparison) -> dict[str, Any]:
    """Matplotlib figures by the names of their files; those that the comparison has no data for are not there."""
    with _styled():
        plots = {"pcc_over_parameters": over_parameters(found), "pcc_over_cost": over_cost(found)}
        plots |= {f"scatter_{i}": scatter(found, model.name) for i, model in enumerate(found.models)}
        plots["residuals_by_step"] = by_step(found)
    return {name: figure for name, figure in plots.items() if figure is not None}


def over_parameters(found: Comparison) -> Any:
    """The paper's Figure 3: weighted mean PCC over parameters, teacher and baselines as lines. None without data."""
    known = {model.name: found.by_clip.means[model.name]["pcc"].weighted for model in found.models}
    if all(value.value is None for value in known.values()):
        return None
    figure, axes = _axes(4.6, 3.3 + _legend_height(len(found.models)))
    colours = iter(_COLOURS * len(found.models))
    for series, members in _by_series(found.models).items():
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


def over_cost(found: Comparison) -> Any:
    """Weighted mean PCC over CPU time per second of audio. None where that is not known."""
    points = [(m, found.cost[m.name], found.by_clip.means[m.name]["pcc"].weighted) for m in found.models]
    points = [(model, cost, value) for model, cost, value in points if cost and value.value is not None]
    if not points:
        return None
    figure, axes = _axes(4.6, 3.3 + _legend_height(len(found.models)))
    for number, (model, cost, value) in enumerate(points):
        again, colour = divmod(number, len(_COLOURS))
        bounds, look = np.array([_bars(value)]).T, {"fmt": _MARKERS[again % len(_MARKERS)], "color": _COLOURS[colour]}
        axes.errorbar([cost], [value.value], bounds, capsize=3, label=model.name, **look)
    _logarithmic(axes, "CPU ms per second of audio")
    _legend(figure)
    return figure


def scatter(found: Comparison, model: str) -> Any:
    """A model's scores over those that it is judged by, one panel for each dataset."""
    from matplotlib.figure import Figure

    datasets, scores = np.array([clip.dataset for clip in found.clips], object), found.scores[model]
    columns = min(4, len(found.datasets))
    rows, side = -(-len(found.datasets) // columns), 1.9 if columns > 1 else 3.0
    figure = Figure(figsize=(side * columns, (side + 0.2) * rows + 0.3), layout="constrained", dpi=_RASTER_DPI)
    panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    for dataset, panel in zip(found.datasets, panels, strict=False):
        here = found.counts & (datasets == dataset) & np.isfinite(scores)
        mos = np.array([clip.mos for clip in found.clips])[here]
        panel.axline((1, 1), slope=1, color=_INK, alpha=0.3, lw=0.8)
        size, is_crowd = 6 if len(mos) > 50 else 16, found.counts.sum() > _MANY
        look = {"alpha": 0.7, "color": _COLOURS[0], "lw": 0, "clip_on": False, "rasterized": is_crowd}
        panel.scatter(mos, scores[here], s=size, **look)
        value = found.pcc(model, dataset).value
        panel.set(xlim=(0.9, 5.1), ylim=(0.9, 5.1), xticks=(1, 3, 5), yticks=(1, 3, 5))
        panel.set_title(f"{dataset}\nPCC {value:.2f}" if value is not None else f"{dataset}\nno PCC")
    for panel in panels[len(found.datasets) :]:
        panel.set_visible(False)
    figure.supxlabel(f"score of {found.judged.judge}", fontsize=9)
    figure.supylabel(f"score of {model}", fontsize=9)
    return figure


def by_step(found: Comparison) -> Any:
    """Medians and quartiles of score less judge's score over the clips that have a degradation step. None without
    plans. A clip of several steps counts with each."""
    members = steps_of(found)
    if not members:
        return None
    figure, axes = _axes(4.6, 0.8 + 0.16 * len(members) * (1 + len(found.models)) + _legend_height(len(found.models)))
    mos = np.array([clip.mos for clip in found.clips])
    for number, (model, colour) in enumerate(zip(found.models, _COLOURS * len(found.models), strict=False)):
        quartiles = [
            np.quantile((found.scores[model.name] - mos)[of_it], [0.25, 0.5, 0.75]) for of_it in members.values()
        ]
        low, middle, high = np.array(quartiles).T
        offset = (number + 1) / (len(found.models) + 1) - 0.5
        places, bounds = np.arange(len(members)) + offset, [middle - low, high - middle]
        axes.errorbar(middle, places, xerr=bounds, fmt="o", ms=4, capsize=2, color=colour, label=model.name)
    axes.axvline(0, color=_INK, lw=0.8, alpha=0.5)
    labels = [f"{step} ({len(of_it)})" for step, of_it in members.items()]
    axes.set(xlabel="residual (MOS), median and quartiles")
    axes.set_yticks(range(len(members)), labels)
    axes.invert_yaxis()
    _legend(figure)
    return figure


def steps_of(found: Comparison) -> dict[str, np.ndarray]:
    """The numbers of the clips that count, by degradation step of their plans; the most frequent first."""
    members: dict[str, list[int]] = {}
    for number, clip in enumerate(found.clips):
        if clip.plan and found.counts[number]:
            steps = {step["step"] for step in json.loads(clip.plan)["steps"]} or {_NO_STEP}
            for step in steps:
                members.setdefault(step, []).append(number)
    ordered = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
    return {step: np.array(of_it) for step, of_it in ordered}


def spectrogram(wave: np.ndarray) -> bytes:
    """A wave's spectrogram as PNG: time to the right, 0 to 8 kHz upwards, 80 dB below the loudest."""
    from matplotlib.image import imsave
    from scipy.signal import stft

    padded = audio.fit(wave, max(len(wave), _SPECTROGRAM["nperseg"]))
    _, _, bins = stft(padded, audio.SAMPLE_RATE, **_SPECTROGRAM)
    decibels = 20 * np.log10(np.abs(bins[:-1]) + 1e-10)
    even = decibels[:, : decibels.shape[1] // 2 * 2]
    halved = even.reshape(len(even) // 2, 2, -1, 2).max(axis=(1, 3))
    halved = _STEP_DB * np.round(halved / _STEP_DB)  # few colours make a small file
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
    """A file of its own, on white."""
    image = BytesIO()
    with _styled({"svg.hashsalt": name}):
        figure.savefig(image, format="svg", facecolor="white", metadata={"Date": None})
    return image.getvalue()


def inline_svg(figure: Any, name: str) -> str:
    """For a page: without the file's head, as wide as its place, in the page's own colour."""
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
    # Identities are those of one file; a page holds several.
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
    """With ticks in words, since the usual powers of ten are mathematics, which texts are not parsed for."""
    from matplotlib.ticker import EngFormatter, NullFormatter

    axes.set(xscale="log", xlabel=of, ylabel="PCC, weighted mean")
    low, high = axes.get_xlim()
    if high < 30 * low:  # or there might be no power of ten in it
        axes.set_xlim(low / 3, high * 3)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _bars(value: Value) -> tuple[float, float]:
    """How far its interval reaches down and up; percentiles need not hold the value itself."""
    if value.value is None or value.low is None or value.high is None:
        return 0.0, 0.0
    return max(0.0, value.value - value.low), max(0.0, value.high - value.value)


def _legend_height(labels: int) -> float:
    """In inches."""
    return 0.2 + 0.18 * -(-labels // 2)


def _legend(figure: Any) -> None:
    figure.legend(loc="outside lower center", ncols=2)


def _by_series(models: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    found: dict[str, list[Candidate]] = {}
    for model in models:
        found.setdefault(model.series, []).append(model)
    return found
