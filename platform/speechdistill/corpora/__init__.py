"""Corpora: one file each. `rows(root, ...)` yields manifest rows: dictionaries of `clip.v1` columns that start from
`uri` and `kind`; what the file's header says (duration, rate, channels, size) the ingest job reads itself. A row with
`error`, an exception, is rejected with it.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any

from speechdistill import table

_FROM_HEADER = {"clip_id", "duration_s", "sample_rate", "channels", "size_bytes", "etag"}
_NUMBERS = {"mos", "votes"}


@cache
def columns() -> frozenset[str]:
    """What a list or a tar may say of a clip."""
    return frozenset(table.schema("clip.v1").names) - _FROM_HEADER - {"uri"}


def given(values: Mapping[str, Any]) -> dict[str, Any]:
    """The known ones of `values` that are not empty, numbers as they were given and the others as text."""
    known = {key: value for key, value in values.items() if key in columns() and value not in ("", None)}
    return {key: value if key in _NUMBERS else str(value) for key, value in known.items()}
