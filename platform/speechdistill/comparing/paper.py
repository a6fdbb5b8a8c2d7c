"""Table I of Distill-MOS: the PCC of eleven models on sixteen test sets, for comparison."""

import csv
from functools import cache
from importlib import resources
from typing import NamedTuple

_MEANS = ("weighted_mean", "unweighted_mean")
_DATASETS = {  # names of `ingest --corpus` that differ from the table's
    "voicemos2022_en": "voicemos_en",
    "voicemos2022_cn": "voicemos_cn",
    "blizzard2023_tts": "blizzard2023_fr_tts",
    "blizzard2023_sa": "blizzard2023_fr_sa",
    "dns_3": "dns3",
    "dns_3_fb": "dns3_fb",
    "plc_2024": "plc2024",
    "sig_2024": "sig2024",
}
_MODELS = {  # names of `--models` that differ from the table's
    "distillmos": "distillmos_v7",
    "squim": "squim_pesq",
    "xlsr": "orig_xlsr2b_l10_t",
}


class Row(NamedTuple):
    """A model of the table: millions of parameters, PCC by dataset (None for an empty cell), and both means."""

    params_m: float
    pcc: dict[str, float | None]
    weighted: float
    plain: float


@cache
def clips() -> dict[str, int]:
    """Return the numbers of clips by dataset, in the table's order."""
    counts = _lines()[0]
    return {name: int(value) for name, value in counts.items() if value and name != "model"}


@cache
def rows() -> dict[str, Row]:
    """Return the rows by model, in the table's order."""
    return {line["model"]: _row(line) for line in _lines()[1:]}


def row_of(model: str) -> str | None:
    """Return the table's name of one of our models; None if the table does not have it."""
    name = _MODELS.get(model, model)
    return name if name in rows() else None


def dataset_of(dataset: str) -> str | None:
    """Return the table's name of one of our datasets; None if the table does not have it."""
    name = _DATASETS.get(dataset, dataset)
    return name if name in clips() else None


def _row(line: dict[str, str]) -> Row:
    pcc = {name: float(line[name]) if line[name] else None for name in clips()}
    weighted, plain = (float(line[name]) for name in _MEANS)
    return Row(float(line["params_m"]), pcc, weighted, plain)


def _lines() -> list[dict[str, str]]:
    text = (resources.files("speechdistill") / "paper_table1.csv").read_text()
    return list(csv.DictReader(text.splitlines()))
