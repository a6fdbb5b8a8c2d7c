"""The log of what MLflow is to know of a run, in `OUT/tracking/` beside the run's results.

    events-<session>-<number>.jsonl   what happened, in order and with its time: `run`, `metrics`, `artifact`, `status`
    artifacts/<name>                  small files, sent from there

Nothing can be appended on object stores, so a segment grows by being published again.
"""

import fcntl
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from speechdistill.io import storage

_SEGMENT_LINES = 256


class EventLog:
    """The events of this session: a queue that any thread fills and one thread writes."""

    def __init__(self, out: str) -> None:
        self._out, self._lock = out, threading.Lock()
        self._queue: list[str] = []
        self._files: dict[str, bytes] = {}
        self._session, self._number = 0, 0
        self._segment: list[str] = []

    def __len__(self) -> int:
        """How many events are not written yet."""
        return len(self._queue)

    def add(self, event: str, **fields: Any) -> None:
        line = json.dumps({"time_ms": _now_ms(), "event": event, **fields})
        with self._lock:
            self._queue.append(line)

    def add_file(self, name: str, data: bytes) -> None:
        with self._lock:
            self._files[name] = data
        self.add("artifact", name=name)

    def flush(self) -> None:
        """Write the queue; raises what the storage raises, and then what was not written stays in the queue."""
        if not self._session:  # later than all before it, also where a clock was set back
            self._session = max([_now_ms(), *(order(name)[0] + 1 for name in segments(self._out))])
        with self._lock:
            files, lines = dict(self._files), list(self._queue)
        for name, data in files.items():  # before the event that tells of it
            storage.publish(data, f"{self._out}/tracking/artifacts/{name}")
        while lines:
            added = lines[: _SEGMENT_LINES - len(self._segment)]
            self._publish(added)
            lines = lines[len(added) :]
        with self._lock:
            self._files = {name: data for name, data in self._files.items() if files.get(name) is not data}

    def _publish(self, added: list[str]) -> None:
        grown = self._segment + added
        name = f"events-{self._session}-{self._number:06d}.jsonl"
        storage.publish(("\n".join(grown) + "\n").encode(), f"{self._out}/tracking/{name}")
        with self._lock:
            del self._queue[: len(added)]
        self._segment = grown
        if len(grown) == _SEGMENT_LINES:
            self._segment, self._number = [], self._number + 1


def segments(out: str) -> dict[str, int]:
    """The segments of the log in their order, with their sizes in bytes."""
    fs, path = storage.file_system(f"{out}/tracking")
    fs.invalidate_cache()
    with storage.access(f"{out}/tracking"):
        entries = fs.ls(path, detail=True) if fs.exists(path) else []
    sizes = {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries}
    return {name: sizes[name] for name in sorted(filter(_is_segment, sizes), key=order)}


def _is_segment(name: str) -> bool:
    return re.fullmatch(r"events-\d+-\d+\.jsonl", name) is not None


def order(name: str) -> tuple[int, int]:
    """(session, number) of a segment."""
    session, number = name.removesuffix(".jsonl").split("-")[1:]
    return int(session), int(number)


def pending(out: str, sent: Mapping[str, int]) -> list[str]:
    return [name for name, size in segments(out).items() if size > sent.get(name, 0)]


def run_event(out: str, names: list[str]) -> dict[str, Any]:
    """The `run` event that begins the first of these segments."""
    return dict(json.loads(read(f"{out}/tracking/{names[0]}").splitlines()[0]))


def last_step(out: str) -> int:
    """The step of the last metrics that earlier sessions told of; -1 where there are none."""
    for name in reversed(segments(out)):
        events = [json.loads(line) for line in read(f"{out}/tracking/{name}").splitlines()]
        if steps := [event["step"] for event in events if event["event"] == "metrics"]:
            return int(steps[-1])
    return -1


def read(uri: str, start: int = 0) -> bytes:
    fs, path = storage.file_system(uri)
    with storage.access(uri):
        return bytes(fs.cat_file(path, start=start or None))


@contextmanager
def alone(out: str) -> Iterator[None]:
    """Keep other processes out, where a local folder can be locked."""
    if "://" in out:
        yield
        return
    folder = os.open(f"{out}/tracking", os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems have no locks
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
