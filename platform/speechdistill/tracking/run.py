"""Tracking of a job as a run in MLflow, without ever stopping or slowing the job.

The job fills a queue. One thread writes the queue to the log beside the run (`event_log.py`), another sends the log to
MLflow (`mlflow_sender.py`) and retries until MLflow answers.
"""

import json
import logging
import math
import os
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Self

from speechdistill.io import fingerprint, storage
from speechdistill.io.errors import UserError
from speechdistill.tracking import database
from speechdistill.tracking.event_log import EventLog, last_step, order, run_event, segments
from speechdistill.tracking.mlflow_client import failure, without_password
from speechdistill.tracking.mlflow_sender import Sender, TrackingError, place, stored

_LOG = logging.getLogger(__name__)
_WRITE_S = 1.0  # at most one write a second: on object stores each writes a whole object
_SEND_S, _SEND_AT_MOST_S = 5.0, 60.0  # between two sends; doubled after each failure


MODEL_ADDRESSES = ("models:", "runs:")
"""Prefixes of the addresses of models in MLflow."""


@dataclass(frozen=True)
class Synced:
    """Result of `sync`: how much was sent, how much is left (refused artifacts, events of a running job), the run."""

    sent: int
    left: int
    run_id: str


def tracking_uri(out: str) -> str:
    """Return the MLflow of the run in `out`: MLFLOW_TRACKING_URI, the database in that folder, or the one above.

    Raises `UserError` if a database cannot lie there.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if "://" in out:
        raise UserError(f"{out} cannot hold the tracking database", "set MLFLOW_TRACKING_URI to your MLflow server")
    folder = Path(out).resolve()
    is_above = not (folder / "mlflow.db").exists() and (folder.parent / "mlflow.db").exists()
    return f"sqlite:///{folder.parent if is_above else folder}/mlflow.db"


def checked_uri(out: str) -> str:
    """Return `tracking_uri(out)`, checked before any work; raises `UserError` if MLflow cannot use the database."""
    uri = tracking_uri(out)
    database.check(uri)
    return uri


def run_id(out: str) -> str | None:
    """Return the id of the MLflow run of `out` at `tracking_uri(out)`, or None if MLflow has not answered yet."""
    out = storage.absolute(out)
    return stored(out, place(out, tracking_uri(out))).run_id


def sync(out: str) -> Synced:
    """Send the events of the run in `out` that MLflow lacks, even while the job is running elsewhere.

    If MLFLOW_TRACKING_URI is not the server of the job, that server gets the whole run as a new one. Raises
    `TrackingError` if `out` has no log, the job was tracked at a server that is not set now, or MLflow does not answer.
    """
    out = storage.absolute(out)
    uri = checked_uri(out)
    names = list(segments(out))
    if not names:
        raise TrackingError(f"{out} has no tracking log (tracking/events-*.jsonl)", "give the --out folder of a run")
    last_session = max(session for session, _ in map(order, names))
    tracked_at = run_event(out, [name for name in names if order(name)[0] == last_session])["place"]
    if tracked_at != place(out, uri) and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise TrackingError(f"{out} was tracked at {tracked_at}", "set MLFLOW_TRACKING_URI to it, or to another server")
    sender = Sender(out, uri)
    try:
        sent = (
            sender.send() + sender.send()
        )  # twice: a running job may have added events meanwhile, above all its last status
    except TrackingError:
        raise
    except Exception as error:
        # `from None`: the original text, which a traceback would print, may hold the password.
        raise TrackingError(
            failure(uri, error), "the log is kept: rerun `speechdistill sync` once MLflow answers"
        ) from None
    return Synced(sent, sender.left(), str(sender.run_id))


class Tracking:
    """One MLflow run for one output folder; a resumed job continues its run. MLflow shows the run below its `parent`.

    No method waits for MLflow or the storage, or raises their errors; only `end` waits, up to its time limit. The
    context manager ends the run with `status`, or after an exception: KILLED after Ctrl-C, else FAILED.
    """

    status = "FINISHED"

    def __init__(
        self,
        out: str,
        experiment: str,
        name: str,
        parameters: Mapping[str, Any],
        parent: "Tracking | None" = None,
    ) -> None:
        self._out = storage.absolute(out)
        self._uri: str = parent._uri if parent else tracking_uri(self._out)
        self._identity = {"experiment": experiment, "name": name, "tag": uuid.uuid4().hex}
        self._log, self._sender = EventLog(self._out), Sender(self._out, self._uri)
        self._work, self._ending, self._over = threading.Event(), threading.Event(), threading.Event()
        self._written, self._all_written, self._all_sent = threading.Event(), threading.Event(), threading.Event()
        self._add(
            "run",
            **self._identity,
            **({"parent": {**parent._identity, "time_ms": time.time_ns() // 1_000_000}} if parent else {}),
            place=place(self._out, self._uri),
            parameters={key: _text(value) for key, value in parameters.items()},
        )
        self._threads = [threading.Thread(target=target, daemon=True) for target in (self._write, self._send)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.end(ended_as(kind) if kind else self.status)

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Add a point for each value, at this time and `step`. A warning reports a value that is not a number."""
        numbers: dict[str, float | str] = {}
        for key, value in values.items():
            with _left_out(f"metric {key}"):
                numbers[key] = _number(value)
        with _left_out("step"):
            self._add("metrics", step=int(step), values=numbers)

    def last_step(self) -> int:
        """Return the last step with metrics of an earlier session; -1 if there is none, or the log cannot be read."""
        with _left_out("the progress of an earlier session"):
            return last_step(self._out)
        return -1

    def figure(self, figure: Any, name: str) -> None:
        """Store a matplotlib figure as the PNG file `name`, replacing an earlier one."""
        with _left_out(name):
            image = BytesIO()
            figure.savefig(image, format="png")
            self._add_file(name, image.getvalue())

    def document(self, value: Mapping[str, Any], name: str) -> None:
        """Store a JSON document as the file `name`, replacing an earlier one."""
        with _left_out(name):
            self._add_file(name, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode())

    def file(self, data: bytes, name: str) -> None:
        """Store a file, replacing an earlier one of that name."""
        with _left_out(name):
            self._add_file(name, data)

    def end(self, status: str, patience_s: float = 30.0) -> None:
        """End with `FINISHED`, `FAILED` or `KILLED`; waits at most `patience_s` seconds for events still to be sent.

        Waiting ends early after an error of the server. A warning reports events that are not sent.
        """
        deadline = time.monotonic() + patience_s
        self._add("status", status=status)
        self._ending.set()
        self._work.set()
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        self._over.set()
        if not self._all_written.is_set():
            _LOG.warning("%d events could not be written to %s/tracking and are lost", len(self._log), self._out)
        elif not self._all_sent.is_set():
            with _left_out("what is left to send"):
                text = "%d events are not sent to MLflow at %s; `speechdistill sync %s` sends them later"
                _LOG.warning(text, self._sender.left(), without_password(self._uri), self._out)

    def _add(self, event: str, **fields: Any) -> None:
        self._log.add(event, **fields)
        self._work.set()

    def _add_file(self, name: str, data: bytes) -> None:
        self._log.add_file(name, data)
        self._work.set()

    def _write(self) -> None:
        """Copy the queue to the log, in the first thread."""
        warned = False
        while not self._over.is_set():
            self._work.wait()
            self._work.clear()
            ending = self._ending.is_set()
            try:
                self._log.flush()
            except Exception as error:
                if not warned:
                    _LOG.warning("%s/tracking: %s; the events are kept in memory and written later", self._out, error)
                warned = True
                self._over.wait(_SEND_S)
                self._work.set()
                continue
            if ending:
                self._all_written.set()
            self._written.set()
            if ending:
                return
            self._ending.wait(_WRITE_S)

    def _send(self) -> None:
        """Send the log to MLflow, in the second thread."""
        pause, warned = _SEND_S, False
        while True:
            self._written.wait()
            self._written.clear()
            last = self._all_written.is_set()
            try:
                self._sender.send()
                complete = not self._sender.late
            except Exception as error:
                complete = False
                if not warned:
                    _LOG.warning("%s; the run continues, and events are sent later", failure(self._uri, error))
                warned = True
            if last:
                if complete:
                    self._all_sent.set()
                return
            if complete:
                pause = _SEND_S
            else:
                self._written.set()
            self._all_written.wait(pause)
            pause = pause if complete else min(2 * pause, _SEND_AT_MOST_S)


def ended_as(kind: type[BaseException]) -> str:
    """Return the status of a run that an exception of this class ended."""
    return "KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED"


def _text(value: Any) -> str:
    """Return a parameter as MLflow stores it, with at most 6000 characters."""
    return fingerprint.shortened(value if isinstance(value, str) else json.dumps(value, default=str), 6000)


def _number(value: Any) -> float | str:
    """Return a number for JSON, which has no NaN: not finite ones become text."""
    number = float(value)
    return number if math.isfinite(number) else str(number)


@contextmanager
def _left_out(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        _LOG.warning("%s is not tracked: %s", what, error)
