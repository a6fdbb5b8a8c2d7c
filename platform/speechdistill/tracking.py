"""The one importer of mlflow: a run that describes a job, and never stops it.

`MLFLOW_TRACKING_URI` wins; else an sqlite database in the output folder. What a server does not take is told once
and left out: the files beside the run are the truth.
"""

import json
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from speechdistill import table

_LOG = logging.getLogger(__name__)


def tracking_uri(out: str) -> str:
    """Where runs under `out` are tracked; raises `ValueError` where that cannot be decided."""
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri
    if "://" in out:
        raise ValueError(f"{out} cannot hold the tracking database; set MLFLOW_TRACKING_URI to your MLflow server")
    return f"sqlite:///{Path(out).resolve()}/mlflow.db"


class Tracking:
    """One MLflow run for one output folder: a resumed job goes on with the run it began."""

    def __init__(self, out: str, experiment: str, name: str, parameters: Mapping[str, Any]) -> None:
        self._uri, self._out, self._failed = tracking_uri(out), out, False
        self.run_id: str | None = None
        self._try(self._start, experiment, name, parameters)

    def metrics(self, values: Mapping[str, float]) -> None:
        def log() -> None:
            for key, value in values.items():
                self._client.log_metric(self.run_id, key, value)

        self._try(log)

    def figure(self, figure: Any, name: str) -> None:
        self._try(lambda: self._client.log_figure(self.run_id, figure, name))

    def document(self, value: Mapping[str, Any], name: str) -> None:
        self._try(lambda: self._client.log_dict(self.run_id, value, name))

    def end(self, status: str) -> None:
        """`FINISHED`, `FAILED` or `KILLED`."""
        self._try(lambda: self._client.set_terminated(self.run_id, status))

    def _start(self, experiment: str, name: str, parameters: Mapping[str, Any]) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # seven, the default, is minutes of waiting
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        from mlflow import MlflowClient

        self._client = MlflowClient(tracking_uri=self._uri)
        known = table.read_json(f"{self._out}/tracking.json")
        if known and known["tracking_uri"] == _without_password(self._uri):
            self.run_id = known["run_id"]
            self._client.update_run(self.run_id, status="RUNNING")
            return
        run = self._client.create_run(self._experiment(experiment), run_name=name)
        self.run_id = run.info.run_id
        for key, value in parameters.items():
            text = value if isinstance(value, str) else json.dumps(value)
            self._client.log_param(self.run_id, key, text)
        table.publish_json(
            {"tracking_uri": _without_password(self._uri), "run_id": self.run_id}, f"{self._out}/tracking.json"
        )

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found:
            return str(found.experiment_id)
        # Without a location of its own, `mlruns/` would land in the working directory.
        location = (Path(self._out).resolve() / "mlartifacts").as_uri() if self._uri.startswith("sqlite:") else None
        return str(self._client.create_experiment(name, artifact_location=location))

    def _try(self, action: Any, *arguments: Any) -> None:
        if self._failed:
            return
        try:
            action(*arguments)
        except Exception as error:
            self._failed = True
            _LOG.warning("MLflow at %s: %s; this run goes on without it", _without_password(self._uri), error)


def _without_password(uri: str) -> str:
    return re.sub("//[^/@]*@", "//", uri)
