"""Synthetic rows for the memory run of the ingest job: files that do not exist, with a probe that makes them up."""

from collections.abc import Iterator
from typing import Any


def rows(count: int) -> Iterator[dict[str, Any]]:
    return ({"uri": f"/corpus/speaker-{i % 997}/clip-{i:09d}.flac", "kind": "speech"} for i in range(count))


def probe(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "duration_s": 10.0, "sample_rate": 16000, "channels": 1, "size_bytes": 160_000}
