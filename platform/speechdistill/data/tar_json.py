"""Columns of the .json member of a sample in a tar, by the rules of lists (`data/listed.py`)."""

import json
from typing import Any

from speechdistill.data import corpus, listed
from speechdistill.data.listed import Row
from speechdistill.io import audio_files
from speechdistill.io.errors import TableError

MAX_BYTES = 1 << 20


def columns(text: bytes) -> tuple[Row, set[str], str | None]:
    """Return the columns of a member, the keys that are not columns, and what is wrong with the member, if anything.

    Case of keys does not matter, as in lists. Keys that begin with `__` belong to the writer and are ignored.
    """
    try:
        if len(text) > MAX_BYTES:
            raise ValueError("larger")
        values = json.loads(text, object_pairs_hook=_once)
        if not isinstance(values, dict):
            raise ValueError(type(values).__name__)
    except (ValueError, RecursionError) as error:
        return {}, set(), f"its .json member is not a JSON object of at most 1 MiB ({audio_files.one_line(error)})"
    names = [key.strip().lower() for key in values]
    known = {name: value for name, value in zip(names, values.values(), strict=True) if name in corpus.columns()}
    unknown = {key for key, name in zip(values, names, strict=True) if name not in known and not key.startswith("__")}
    if any(names.count(name) > 1 for name in known):
        return {}, unknown, f"its .json member has a column twice: {list(values)}"
    try:
        return listed.normalised(corpus.given(known)), unknown, None
    except TableError as error:
        return {}, unknown, f"its .json member: {error.reason}"


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """Reject equal keys; the last would win silently."""
    if len(values := dict(pairs)) < len(pairs):
        raise ValueError(f"repeated keys: {[key for key, _ in pairs]}")
    return values
