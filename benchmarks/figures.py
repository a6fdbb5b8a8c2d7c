"""Figures of the battery for a GPU: printed at once, kept as JSON lines, and a table of them."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FILE = Path(os.environ.get("OUT", "on_gpu-out")) / "figures.jsonl"


def tell(
    section: str, name: str, value: float | str, unit: str = "", bar: float | None = None, most: bool = False
) -> None:
    """Print a figure and append it to the file; `bar` is the least that is wanted of it, or, with `most`, the most."""
    ok = None if bar is None or isinstance(value, str) else (value <= bar if most else value >= bar)
    figure = {"section": section, "name": name, "value": value, "unit": unit, "bar": bar, "most": most, "ok": ok}
    print(" | ".join(row(figure)), flush=True)
    FILE.parent.mkdir(parents=True, exist_ok=True)
    with FILE.open("a") as file:
        file.write(json.dumps({**figure, "at": datetime.now(UTC).isoformat(timespec="seconds")}) + "\n")


def row(figure: dict[str, Any]) -> list[str]:
    value = figure["value"]
    text = (
        value.replace("|", "/")
        if isinstance(value, str)
        else f"{value:,.4g}"
        if abs(value) < 10_000
        else f"{value:,.0f}"
    )
    bar = "" if figure["bar"] is None else f"at {'most' if figure['most'] else 'least'} {figure['bar']:g}"
    missed = {True: "yes", False: "**no**", None: ""}[figure["ok"]]
    return [figure["section"], figure["name"], f"{text} {figure['unit']}".strip(), bar, missed]


def table() -> str:
    """Markdown of the last figure of each name."""
    lines = [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []
    last = {(figure["section"], figure["name"]): figure for figure in lines}
    rows = [["section", "figure", "value", "bar", "met"], ["---"] * 5, *map(row, last.values())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
