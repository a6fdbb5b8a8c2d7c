"""Send the log of a run to an MLflow server or database. Models are sent by `registry.py`.

`OUT/tracking/sent.json` holds for each MLflow the run's id, the bytes sent of each segment and the artifacts not sent.
Each event is sent at least once. MLflow keeps equal points once, and runs are found by their tag, so a killed driver
or a `sync` beside a running job duplicates nothing. (Object stores cannot be locked: there, two processes that create
the run at the same instant can create two.)
"""

import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from speechdistill.io import storage
from speechdistill.io.errors import UserError
from speechdistill.tracking import mlflow_client
from speechdistill.tracking.event_log import alone, pending, read, run_event, segments

_LOG = logging.getLogger(__name__)
_TAG = "speechdistill.run"


class TrackingError(UserError, RuntimeError):
    """A run that cannot be sent to MLflow."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Stored progress of sending to one MLflow: its run, the bytes sent of each segment, the artifacts not sent."""

    run_id: str | None = None
    segments: Mapping[str, int] = field(default_factory=dict)
    artifacts_left: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return {"run_id": self.run_id, "sent": dict(self.segments), "artifacts_left": list(self.artifacts_left)}


class Sender:
    """Sender of one output folder's log to one MLflow, for use by one thread."""

    def __init__(self, out: str, uri: str) -> None:
        self._out, self._uri, self._place = out, uri, place(out, uri)
        self._client: Any = None
        self.run_id: str | None = None  # None before the first connection, and after a failure
        self._sent: dict[str, int] = {}
        self.late: list[str] = []  # artifacts not accepted yet: later points do not wait for them
        self._refused: set[tuple[str, str]] = set()
        self._told: set[str] = set()

    def send(self) -> int:
        """Send missing events and artifacts, store the progress, return their number; raises the server's errors."""
        try:
            return self._send()
        except TrackingError:
            raise
        except Exception as error:
            if mlflow_client.is_timeout(error):
                raise
            # A connection that was kept open fails once after the server has closed it.
            return self._send()

    def left(self) -> int:
        """Return the number of events and artifacts that are not sent."""
        # The stored progress may be that of another process, which has sent less.
        known = self._progress() if self.run_id else stored(self._out, self._place)
        names = pending(self._out, known.segments)
        lines = (read(f"{self._out}/tracking/{name}", known.segments.get(name, 0)) for name in names)
        return sum(data.count(b"\n") for data in lines) + len(known.artifacts_left)

    def _send(self) -> int:
        try:
            if self.run_id is None:
                self._connect()
            before = len(self.late)
            lines = sum(self._send_segment(name) for name in pending(self._out, self._sent))
        except Exception:
            self.run_id = None
            raise
        for name in list(self.late):
            self._send_artifact(name)
        return lines + before - len(self.late)

    def _connect(self) -> None:
        """Find the run on the server, or create it. The stored state of a run that was deleted is dropped."""
        self._client = self._client or mlflow_client.client(self._uri)
        with alone(self._out):
            known = stored(self._out, self._place)
            if known.run_id and self._is_active(known.run_id):
                self.run_id, self._sent, self.late = known.run_id, dict(known.segments), list(known.artifacts_left)
                return
            first = run_event(self._out, list(segments(self._out)))
            self.run_id = self._find(first) or self._create(first)
            self._sent, self.late = {}, []
            self._store()

    def _is_active(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            return bool(self._client.get_run(run_id).info.lifecycle_stage == "active")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise

    def _find(self, first: Mapping[str, Any]) -> str | None:
        experiment = self._client.get_experiment_by_name(first["experiment"])
        if not experiment:
            return None
        runs = self._client.search_runs([experiment.experiment_id], f"tags.`{_TAG}` = '{first['tag']}'")
        return min((str(run.info.run_id) for run in runs), default=None)

    def _create(self, first: Mapping[str, Any]) -> str:
        tags = {_TAG: first["tag"]}
        if parent := first.get("parent"):
            tags["mlflow.parentRunId"] = self._find(parent) or self._create(parent)
        experiment = self._experiment(first["experiment"])
        run = self._client.create_run(experiment, first["time_ms"], tags=tags, run_name=first["name"])
        mine = str(run.info.run_id)
        chosen = self._find(first) or mine
        if chosen != mine:  # another process that could not be locked out has created one as well
            self._client.delete_run(mine)
        return chosen

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        experiment = self._client.get_experiment_by_name(name)
        if not experiment:
            try:
                return str(self._client.create_experiment(name, _artifact_location(self._out, self._uri)))
            except MlflowException:  # another job may have created it just now
                experiment = self._client.get_experiment_by_name(name)
                if not experiment:
                    raise
        return str(experiment.experiment_id)

    def _send_segment(self, name: str) -> int:
        from mlflow.entities import Metric

        start = self._sent.get(name, 0)
        data = read(f"{self._out}/tracking/{name}", start)
        events = [json.loads(line) for line in data.splitlines()]
        for event in events:
            if event["event"] == "run":
                self._send_parameters(event["parameters"])
        points = [
            Metric(key, float(value), event["time_ms"], event["step"])
            for event in events
            if event["event"] == "metrics"
            for key, value in event["values"].items()
        ]
        self._log_batch("metrics", points, 1000)
        states = [event for event in events if event["event"] in ("run", "status")]
        if states:
            self._send_status(states[-1].get("status", "RUNNING"), states[-1]["time_ms"])
        artifacts = [event["name"] for event in events if event["event"] == "artifact"]
        self.late = list(dict.fromkeys([*self.late, *artifacts]))
        self._sent[name] = start + len(data)
        self._store()
        return len(events)

    def _send_parameters(self, parameters: Mapping[str, str]) -> None:
        """Send parameters that the run lacks. MLflow refuses to change one, so a changed parameter becomes a tag."""
        from mlflow.entities import Param, RunTag

        there = self._client.get_run(self.run_id).data
        new = [Param(key, value) for key, value in parameters.items() if key not in there.params]
        changed = [
            RunTag(f"changed.{key}", value)
            for key, value in parameters.items()
            if key in there.params and value != there.tags.get(f"changed.{key}", there.params[key])
        ]
        self._log_batch("params", new, 100)
        self._log_batch("tags", changed, 100)

    def _log_batch(self, kind: str, items: list[Any], at_most: int) -> None:
        """Log up to `at_most` items at once. A name that MLflow refuses is left out: later items would wait for it."""
        from mlflow.exceptions import MlflowException

        for start in range(0, len(items), at_most):
            some = [item for item in items[start : start + at_most] if (kind, item.key) not in self._refused]
            try:
                self._client.log_batch(self.run_id, **{kind: some})
            except MlflowException as error:
                if error.error_code not in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
                    raise
                if not self._is_active(str(self.run_id)):  # deleted just now: the next send creates it again
                    raise
                if len(some) == 1:
                    self._refused.add((kind, some[0].key))
                    self._tell(f"{some[0].key!r} of the {kind} is refused by MLflow and left out", error)
                else:
                    self._log_batch(kind, some, len(some) // 2)

    def _send_status(self, status: str, time_ms: int) -> None:
        if status == "RUNNING":
            self._client.update_run(self.run_id, status)
        else:
            self._client.set_terminated(self.run_id, status, time_ms)

    def _send_artifact(self, name: str) -> None:
        folder, _, file = name.rpartition("/")
        try:
            with tempfile.TemporaryDirectory() as temporary:
                (Path(temporary) / file).write_bytes(read(f"{self._out}/tracking/artifacts/{name}"))
                self._client.log_artifact(self.run_id, f"{temporary}/{file}", folder or None)
            self.late.remove(name)
            self._store()
        except Exception as error:
            self._tell(f"artifact {name} is not sent yet", error)

    def _tell(self, text: str, error: Exception) -> None:
        if text not in self._told:
            _LOG.warning("%s (%s)", text, mlflow_client.failure(self._uri, error))
        self._told.add(text)

    def _progress(self) -> Sent:
        return Sent(run_id=self.run_id, segments=dict(self._sent), artifacts_left=list(self.late))

    def _store(self) -> None:
        """Store the progress. The last of several writers wins: at worst, events are sent again."""
        sent = storage.read_json(f"{self._out}/tracking/sent.json") or {}
        sent[self._place] = self._progress().to_json()
        storage.publish_json(sent, f"{self._out}/tracking/sent.json")


def _artifact_location(out: str, uri: str) -> str | None:
    """Return the address of artifacts if no server chooses it: `mlruns/` would land in the current folder."""
    if uri.startswith("sqlite:///"):
        return artifact_folder(Path(uri.removeprefix("sqlite:///").partition("?")[0]))
    return None if uri.startswith(("http", "databricks")) else f"{out}/mlartifacts"


def artifact_folder(database: Path) -> str:
    """Return the URL of the folder beside a sqlite database that holds the files of its runs."""
    return (database.resolve().parent / "mlartifacts").as_uri()


def stored(out: str, place: str) -> Sent:
    """Return the stored progress of sending to an MLflow; empty if nothing was sent there."""
    known = (storage.read_json(f"{out}/tracking/sent.json") or {}).get(place)
    if not known:
        return Sent()
    return Sent(run_id=known["run_id"], segments=known["sent"], artifacts_left=known["artifacts_left"])


def place(out: str, uri: str) -> str:
    """Return the name of an MLflow in sent.json. A database in the folder, or above it, keeps its name if both move."""
    for name, folder in (("mlflow.db", out), ("../mlflow.db", out.rpartition("/")[0])):
        if uri == f"sqlite:///{folder}/mlflow.db":
            return name
    return mlflow_client.without_password(uri)
