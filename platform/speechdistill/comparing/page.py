"""A comparison as one self-contained HTML file: table, plots, the worst clips to listen to, provenance."""

import base64
import json
from collections.abc import Mapping
from importlib import resources
from io import BytesIO
from typing import Any, NamedTuple

import numpy as np
import soundfile
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from speechdistill.comparing import judged, plots, tables
from speechdistill.comparing.candidates import Candidate
from speechdistill.comparing.comparison import Comparison
from speechdistill.io import audio, checkpoint
from speechdistill.io.errors import AudioError
from speechdistill.metrics.figures import METRICS, Value

_WORST = 20
_PLAYED_S = 8.0  # of a clip, which keeps the file small
_CHARACTERS = 300  # of a step's settings, and of a model's provenance
_CAPTIONS = {
    "pcc_over_parameters": "PCC over parameters, as in the paper’s Figure 3; bars are 95% intervals",
    "pcc_over_cost": "PCC over CPU time for a second of audio, one thread, measured while these clips were scored",
    "residuals_by_step": "Score less the judge’s, by degradation step (clips that have it, each with all of its steps)",
}


class Cell(NamedTuple):
    text: str
    title: str
    best: bool
    small: str = ""
    more: str = ""


def html(comparison: Comparison, figures: Mapping[str, Any]) -> str:
    """Return the page; `figures` are those of `plots.all_plots`."""
    text = (resources.files("speechdistill") / "page.html").read_text(encoding="utf-8")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True).from_string(text)
    scatters = {f"scatter_{number}": model.name for number, model in enumerate(comparison.models)}
    made: str = template.render(
        title=f"Speech quality models on {comparison.judged.source.rsplit('/', 1)[-1]}",
        summary=_summary(comparison),
        is_teacher=comparison.judged.teacher is not None,
        columns=list(comparison.by_clip.clips.items()),
        table=[_row(comparison, model) for model in comparison.models],
        heard=tables.heard(comparison),
        left_out=tables.left_out(comparison),
        beside=tables.beside_paper(comparison) if comparison.about.get("configuration", {}).get("paper") else [],
        all_figures=_all_figures(comparison),
        pairs=tables.pairs(comparison),
        plots=[_plot(figures[name], name, _CAPTIONS[name]) for name in _CAPTIONS if name in figures],
        scatters=[_plot(figures[name], name, f"Scores of {m}") for name, m in scatters.items() if name in figures],
        worst=worst(comparison),
        num_clips=int(comparison.counts.sum()),
        first=comparison.models[0].name,
        provenance=_provenance(comparison),
        models=_models(comparison),
    )
    # Names of files need not be UTF-8; Python carries such bytes as surrogates, which no file can hold.
    return made.encode("utf-8", "backslashreplace").decode()


def worst(comparison: Comparison, most: int = _WORST) -> list[dict[str, Any]]:
    """Return the clips whose score by the first model is furthest from the judge's, as the page shows them."""
    mos = np.array([clip.mos for clip in comparison.clips])
    away = np.where(comparison.counts, np.abs(comparison.scores[comparison.models[0].name] - mos), np.nan)
    order = [number for number in np.argsort(-away) if np.isfinite(away[number])]
    return [_clip(comparison, int(number)) for number in order[:most]]


def _clip(comparison: Comparison, number: int) -> dict[str, Any]:
    clip = comparison.clips[number]
    scores = {name: column[number] for name, column in comparison.scores.items()}
    texts = [f"{comparison.judged.judge} {clip.mos:.2f}"]
    texts += [f"{name} {score:.2f}" for name, score in scores.items() if np.isfinite(score)]
    shown = {
        "name": f"sample {clip.clip_id}" if clip.plan else clip.uri.rsplit("/", 1)[-1],
        "dataset": clip.dataset,
        "difference": f"{scores[comparison.models[0].name] - clip.mos:+.2f} MOS",
        "scores": " · ".join(texts),
        "steps": _steps(clip.plan),
        "problem": "",
    }
    try:
        wave = judged.read(clip.uri)[: round(_PLAYED_S * audio.SAMPLE_RATE)]
    except (AudioError, OSError) as error:  # the clip was there when it was scored
        return {**shown, "problem": f"It cannot be played: {error}"}
    return {
        **shown,
        "seconds": f"{len(wave) / audio.SAMPLE_RATE:.1f}",
        "audio": _data("audio/flac", _flac(wave)),
        "image": _data("image/png", plots.spectrogram(wave)),
    }


def _steps(plan: str | None) -> list[str]:
    if plan is None:
        return []
    return [_words(step) for step in json.loads(plan)["steps"]] or ["as recorded"]


def _words(step: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {_setting(value)}" for key, value in step.items() if key != "step")
    text = f"{step['step']}: {settings}" if settings else str(step["step"])
    return _short(text)


def _short(text: str) -> str:
    """Cut a text at a space; a single long word, such as a hash, is cut anywhere."""
    if len(text) <= _CHARACTERS:
        return text
    start = text[:_CHARACTERS]
    return f"{start.rpartition(' ')[0].rstrip(',') or start} …"


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _row(comparison: Comparison, model: Candidate) -> dict[str, Any]:
    mean, cost = comparison.by_clip.means[model.name]["pcc"], comparison.cost[model.name]
    cells = [
        _mean(mean.weighted, model.name == comparison.best(None)),
        _mean(mean.plain, model.name == comparison.best(None, plain=True)),
    ]
    for dataset in comparison.datasets:
        value = comparison.pcc(model.name, dataset)
        title, best = tables.interval(value), model.name == comparison.best(dataset)
        cells.append(Cell(tables.cell(value), title, best, more=_bounds(value) or title))
    if mean.datasets and model.name not in comparison.whole:
        only = f"over {mean.datasets} of {len(comparison.datasets)} datasets"
        cells[:2] = [cell._replace(small=only) for cell in cells[:2]]
    parameters = tables.count(model.parameters)
    return {"name": model.name, "cells": cells, "parameters": parameters, "cost": tables.number(cost, 1)}


def _mean(value: Value, best: bool) -> Cell:
    return Cell(tables.cell(value), tables.interval(value), best, _bounds(value))


def _bounds(value: Value) -> str:
    return f"{value.low:.2f} to {value.high:.2f}" if value.low is not None else ""


def _all_figures(comparison: Comparison) -> list[list[str]]:
    rows = [["model", "of", *METRICS.values()]]
    for level, figures in (("clips", comparison.by_clip), ("systems", comparison.by_system)):
        for name, means in figures.means.items():
            if figures.clips:
                rows.append([name, level, *(tables.number(means[metric].weighted.value, 3) for metric in METRICS)])
    return rows


def _summary(comparison: Comparison) -> str:
    count = int(comparison.counts.sum())
    sets = f"{len(comparison.datasets)} dataset{'s' if len(comparison.datasets) > 1 else ''}"
    hours = sum(row["duration_s"] or 0 for row in comparison.rows[:: len(comparison.models)]) / 3600
    return (
        f"{len(comparison.models)} models on {count:,} clips ({hours:.2f} h) of {sets}, "
        f"compared with the scores of {comparison.judged.judge}."
    )


def _provenance(comparison: Comparison) -> list[tuple[str, str]]:
    about = comparison.about
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    return [
        ("made at", str(about.get("finished_at", ""))),
        ("clips", comparison.judged.source),
        ("sha256 over the clips", about.get("clips_sha256", "")),
        ("versions", versions),
        ("configuration", json.dumps(about.get("configuration", {}), ensure_ascii=False)),
    ]


def _models(comparison: Comparison) -> list[list[str]]:
    rows = [["model", "address", "in Figure 3", "sha256 of its weights", "trained from"]]
    for model in comparison.models:
        known = json.dumps(checkpoint.brief(model.provenance), ensure_ascii=False) if model.provenance else ""
        rows.append([model.name, model.address, model.series, f"{model.sha256[:16]}…", _short(known)])
    return rows


def _plot(figure: Any, name: str, caption: str) -> dict[str, Any]:
    svg = plots.inline_svg(figure, name).replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return {"caption": caption, "svg": Markup(svg)}  # matplotlib escapes its texts


def _flac(wave: np.ndarray) -> bytes:
    data = BytesIO()
    soundfile.write(data, audio.quantise(wave), audio.SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return data.getvalue()


def _data(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
