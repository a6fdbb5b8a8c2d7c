"""The .json member of a sample in a tar: its columns, by the rules of lists (`data/listed.py`)."""

import json
from typing import Any

from speechdistill.data import corpus, listed
from speechdistill.io import audio_files
from speechdistill.io.errors import TableError

MAX_BYTES = 1 << 20

Row = dict[str, Any]


def columns(text: bytes) -> tuple[Row, set[str], str | None]:
    """The columns that a member gives, names that are no columns, and what is wrong with it, if anything is.

    Names are taken in any case, as in lists; those in `__` are the writer's own.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError("it is larger")
        values = json.loads(text, object_pairs_hook=_once)
        if not isinstance(values, dict):
            raise ValueError(type(values).__name__)
    except (ValueError, RecursionError) as error:
        return {}, set(), f"its .json member is not a JSON object of at most 1 MiB ({audio_files.one_line(error)})"
    names = [key.strip().lower() for key in values]
    known = {name: value for name, value in zip(names, values.values(), strict=True) if name in corpus.columns()}
    unknown = {key for key, name in zip(values, names, strict=True) if name not in known and not key.startswith("__")}
    if any(names.count(name) > 1 for name in known):
        return {}, unknown, f"its .json member gives a column twice: {list(values)}"
    try:
        return listed.normalised(corpus.given(known)), unknown, None
    except TableError as error:
        return {}, unknown, f"its .json member: {error.reason}"


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """The last of two equal keys would win without a word."""
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError(f"a key twice: {[key for key, _ in pairs]}")
    return values
