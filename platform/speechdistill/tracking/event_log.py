"""Log of a run's events for MLflow, in `OUT/tracking/` beside the run's results.

    events-<session>-<number>.jsonl   events in order, with their times: `run`, `metrics`, `artifact`, `status`
    artifacts/<name>                  small files, sent from there

Object stores cannot append, so a segment grows by being published again.
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
    """Events of this session: a queue that any thread fills and one thread writes."""

    def __init__(self, out: str) -> None:
        self._out, self._lock = out, threading.Lock()
        self._queue: list[str] = []
        self._files: dict[str, bytes] = {}
        self._session, self._number = 0, 0
        self._segment: list[str] = []

    def __len__(self) -> int:
        """Return the number of events that are not written yet."""
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
        """Write the queue. If the storage raises an error, the events that were not written stay in the queue."""
        if not self._session:  # later than all earlier ones, even if the clock was set back
            self._session = max([_now_ms(), *(order(name)[0] + 1 for name in segments(self._out))])
        with self._lock:
            files, lines = dict(self._files), list(self._queue)
        for name, data in files.items():  # before the event that names it
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
    """Return the segments of the log in order, with their sizes in bytes."""
    fs, path = storage.file_system(f"{out}/tracking")
    fs.invalidate_cache()
    with storage.access(f"{out}/tracking"):
        entries = fs.ls(path, detail=True) if fs.exists(path) else []
    sizes = {entry["name"].rsplit("/", 1)[-1]: int(entry["size"]) for entry in entries}
    return {name: sizes[name] for name in sorted(filter(_is_segment, sizes), key=order)}


def _is_segment(name: str) -> bool:
    return re.fullmatch(r"events-\d+-\d+\.jsonl", name) is not None


def order(name: str) -> tuple[int, int]:
    """Return (session, number) of a segment."""
    session, number = name.removesuffix(".jsonl").split("-")[1:]
    return int(session), int(number)


def pending(out: str, sent: Mapping[str, int]) -> list[str]:
    """Return the segments with bytes that were not sent; `sent` are the bytes sent of each."""
    return [name for name, size in segments(out).items() if size > sent.get(name, 0)]


def run_event(out: str, names: list[str]) -> dict[str, Any]:
    """Return the `run` event at the beginning of the first of these segments."""
    return dict(json.loads(read(f"{out}/tracking/{names[0]}").splitlines()[0]))


def last_step(out: str) -> int:
    """Return the step of the last metrics of earlier sessions; -1 if there are none."""
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
    """Keep other processes out, if the folder is local and can be locked."""
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
