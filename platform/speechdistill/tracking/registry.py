"""Students in MLflow: log them to a run as a model, fetch them, register them, move aliases.

A logged student loads without this package: the modules that it needs are stored with it. Our own tools read only its
safetensors and configuration (`student_folder`).
"""

import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple, Self

from speechdistill.io import checkpoint, fingerprint, storage
from speechdistill.io.errors import UserError
from speechdistill.tracking import database
from speechdistill.tracking.mlflow_client import PatientClient, failure, patiently, without_password
from speechdistill.tracking.mlflow_model import MODEL, save_model
from speechdistill.tracking.run import MODEL_ADDRESSES


class RegistryError(UserError, RuntimeError):
    """A model or run that MLflow lacks or does not return."""


class Logged(NamedTuple):
    """A student logged to a run. `location` is the URL of its files, `tags` hold its provenance."""

    model_id: str
    run_id: str
    location: str
    tags: dict[str, str]

    @property
    def uri(self) -> str:
        """Return the address for MLflow's tools."""
        return f"models:/{self.model_id}"

    @property
    def sources(self) -> tuple[str, str]:
        """Return the possible sources of a registered version: ours, and that of MLflow's own pages."""
        return self.location, self.uri


class Version(NamedTuple):
    """A registered version of a model name; `source` is the address at registration."""

    name: str
    number: str
    run_id: str
    source: str

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.number}"


def log_student(folder: str, run_id: str, uri: str | None = None) -> Logged:
    """Log the checkpoint in `folder` (see `io.checkpoint`) to an MLflow run as its model `student`.

    `uri` is the MLflow (default: MLFLOW_TRACKING_URI). The checkpoint's provenance becomes metadata and tags of the
    model. The call may be repeated: a run with a model of these weights keeps that model. Raises `TableError` if the
    folder holds no checkpoint, and `RegistryError` if MLflow does not know the run or does not answer.
    """
    student = checkpoint.read(folder)
    registry = Registry(uri)
    same = [model for model in registry.logged(run_id) if model.tags.get("weights_sha256") == student.weights_hash]
    return same[0] if same else registry.log(folder, run_id, student.provenance, student.weights_hash)


@contextmanager
def student_folder(address: str, uri: str | None = None) -> Iterator[str]:
    """Yield a folder with the two files of the student at `address`; it exists while the body runs.

    `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/MODEL_ID` and `runs:/RUN_ID/student` are fetched from the
    MLflow at `uri` (default: MLFLOW_TRACKING_URI). Any other address is a folder or URL and yielded as it is.
    Raises `RegistryError`.
    """
    if not address.startswith(MODEL_ADDRESSES):
        yield storage.absolute(address)
        return
    with tempfile.TemporaryDirectory(prefix="speechdistill-") as folder:
        yield Registry(uri).fetch(address, folder)


class Registry:
    """One MLflow, at `uri` or MLFLOW_TRACKING_URI. Each method raises `RegistryError` naming the run or model."""

    def __init__(self, uri: str | None = None) -> None:
        self.uri = uri or os.environ.get("MLFLOW_TRACKING_URI", "")
        if not self.uri:
            raise RegistryError("no MLflow is given", "set MLFLOW_TRACKING_URI, or --tracking to a run's folder")
        database.check(self.uri, writes=False)
        if (file := database.file_of(self.uri)) and not file.exists():
            raise RegistryError(f"{self.uri}: no such database", "give the folder of a run, or set MLFLOW_TRACKING_URI")
        self.place = without_password(self.uri)
        with self._asked("MLflow cannot be used"):
            self._client: Any = PatientClient(self.uri)

    def logged(self, run_id: str) -> list[Logged]:
        """Return the students that a run has logged, newest first, without those whose upload failed."""
        with self._asked(f"run {run_id}"):
            experiment = self._client.get_run(run_id).info.experiment_id
            name = f"source_run_id = '{run_id}' AND name = '{MODEL}'"
            order = [{"field_name": "creation_timestamp", "ascending": False}]
            found = self._client.search_logged_models([experiment], name, order_by=order)
            return [Logged(m.model_id, run_id, m.artifact_location, m.tags) for m in found if m.status == "READY"]

    def log(self, folder: str, run_id: str, provenance: Mapping[str, Any], weights_hash: str) -> Logged:
        """Log the checkpoint in `folder` as a new model of a run."""
        from mlflow.entities import LoggedModelOutput

        provenance = checkpoint.brief(provenance)
        known = {f"provenance.{key}": _text(value) for key, value in provenance.items() if value}
        tags = {"weights_sha256": weights_hash, **known}
        with self._asked(f"run {run_id}"):
            experiment = self._client.get_run(run_id).info.experiment_id
            model = self._client.create_logged_model(experiment, MODEL, run_id, tags, model_type="speech-quality")
            try:
                with tempfile.TemporaryDirectory(prefix="speechdistill-") as local:
                    about = {"provenance": provenance, "weights_sha256": weights_hash}
                    save_model(folder, f"{local}/model", run_id=run_id, model_id=model.model_id, metadata=about)
                    self._client.log_model_artifacts(model.model_id, f"{local}/model")
                self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, 0)])
                self._client.finalize_logged_model(model.model_id, "READY")
            except BaseException:
                with suppress(Exception):  # the first error is reported
                    self._client.finalize_logged_model(model.model_id, "FAILED")
                raise
            return Logged(model.model_id, run_id, model.artifact_location, tags)

    def best_of(self, parent: str, metric: str, direction: Literal["min", "max"] = "min") -> str:
        """Return the finished child run with the lowest (`max`: highest) `metric`.

        Raises `RegistryError` if none has it.
        """
        with self._asked(f"run {parent}"):
            experiment = self._client.get_run(parent).info.experiment_id
            wanted = f"tags.`mlflow.parentRunId` = '{parent}' AND attributes.status = 'FINISHED'"
            page = self._client.search_runs([experiment], wanted, max_results=1000)
            runs: list[Any] = list(page)
            while page.token:
                page = self._client.search_runs([experiment], wanted, max_results=1000, page_token=page.token)
                runs += page
        values = {run.info.run_id: run.data.metrics.get(metric) for run in runs}
        finite = {run: value for run, value in values.items() if value is not None and abs(value) < float("inf")}
        if not finite:
            raise RegistryError(
                f"run {parent} at {self.place}: none of its {len(runs)} finished child runs has a {metric}",
                "give the run that started them, once one has ended, or --run ID of a single one",
            )
        sign = 1 if direction == "min" else -1
        return str(min(finite, key=lambda run: (sign * finite[run], run)))

    def fetch(self, address: str, folder: str) -> str:
        """Copy the two files of the student at a `models:/` or `runs:/` address below `folder`; return their folder."""
        from mlflow.artifacts import download_artifacts

        with self._asked(address):
            location, tags = self._found(address)
            source = f"{location}/artifacts/{MODEL}"
            fetched: str = patiently(download_artifacts, artifact_uri=source, dst_path=folder, tracking_uri=self.uri)
            logged = tags.get("weights_sha256")
            if logged and logged != fingerprint.of_file(f"{fetched}/{checkpoint.WEIGHTS}"):
                reason = f"{address}: the weights at {self.place} differ from the logged ones"
                raise RegistryError(reason, "restore the model's artifacts, or give another version")
            return fetched

    def by_alias(self, name: str, alias: str) -> Version | None:
        """Return the version of a model name with an alias; None if no version has it, or the name is unknown."""
        from mlflow.exceptions import MlflowException

        with self._asked(f"model {name}"):
            try:
                number = self._client.get_registered_model(name).aliases.get(alias)
            except MlflowException as error:
                if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                    return None
                raise
            return _version(self._client.get_model_version(name, str(number))) if number else None

    def register(self, name: str, model: Logged) -> Version:
        """Return the version of `name` that is this model; create it if there is none. The call may be repeated."""
        from mlflow.exceptions import MlflowException

        with self._asked(f"model {name}"):
            try:
                self._client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            # Not by its models:/ address, which MLflow would look up in its default database instead of this one.
            found = [v for v in self._client.search_model_versions(f"name = '{name}'") if v.source in model.sources]
            about = (model.location, model.run_id, model.tags)
            return _version(
                found[0] if found else self._client.create_model_version(name, *about, model_id=model.model_id)
            )

    def point(self, name: str, alias: str, version: Version) -> None:
        """Move an alias to a version."""
        with self._asked(f"{name}@{alias}"):
            self._client.set_registered_model_alias(name, alias, version.number)

    def note(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with self._asked(version.uri):
            for key, value in tags.items():
                self._client.set_model_version_tag(version.name, version.number, key, value)

    def document(self, run_id: str, value: Mapping[str, Any], name: str) -> None:
        """Store a JSON document as an artifact of a run; an earlier one of that name is replaced."""
        with self._asked(f"run {run_id}"):
            self._client.log_text(run_id, json.dumps(value, indent=2, ensure_ascii=False) + "\n", name)

    def lacks(self, name: str, alias: str) -> RegistryError:
        """Return the error for a missing alias: the name is unknown, or no version of it has the alias."""
        with self._asked(f"model {name}"):
            known = {model.name: model.aliases for model in self._client.search_registered_models()}
        if name not in known:
            other = f"choose from {', '.join(sorted(known))}" if known else "`speechdistill promote` registers one"
            fix = f"{other}, or set MLFLOW_TRACKING_URI to another MLflow"
            return RegistryError(f"no model {name!r} is registered at {self.place}", fix)
        aliases = ", ".join(sorted(known[name])) or "none"
        reason = f"model {name!r} at {self.place} has no version with the alias {alias!r}; its aliases: {aliases}"
        return RegistryError(reason, "give models:/NAME/NUMBER; `speechdistill promote` sets `champion`")

    def _found(self, address: str) -> tuple[str, Mapping[str, str]]:
        """Return the URL of a model's files, and the model's tags."""
        if match := re.fullmatch(rf"runs:/(\w+)/{MODEL}", address):
            models = self.logged(match[1])
            if not models:
                reason = f"{address}: run {match[1]} has logged no model {MODEL!r} at {self.place}"
                raise RegistryError(reason, "give the run of a student, once its training has ended")
            return models[0].location, models[0].tags
        if match := re.fullmatch(r"models:/([^/@]+)@([^/@]+)", address):
            version = self.by_alias(match[1], match[2])
            if version is None:
                raise self.lacks(match[1], match[2])
            address = version.uri
        if match := re.fullmatch(r"models:/([^/@]+)/(\d+)", address):
            location = str(self._client.get_model_version_download_uri(match[1], match[2]))
            return location, self._client.get_model_version(match[1], match[2]).tags
        if match := re.fullmatch(r"models:/(m-\w+)", address):
            found = self._client.get_logged_model(match[1])
            return str(found.artifact_location), found.tags
        raise RegistryError(
            f"{address!r} is not the address of a student",
            f"choose from models:/NAME@ALIAS, models:/NAME/VERSION, models:/MODEL_ID and runs:/RUN_ID/{MODEL}",
        )

    @contextmanager
    def _asked(self, what: str) -> Iterator[Self]:
        try:
            yield self
        except UserError:
            raise
        except Exception as error:
            # `from None`: the original text, which a traceback would print, may hold the password.
            reason = " ".join(failure(self.uri, error).split())[:500]
            raise RegistryError(f"{what}: {reason}", "check its name and MLFLOW_TRACKING_URI") from None


def _version(found: Any) -> Version:
    return Version(found.name, str(found.version), found.run_id or "", found.source)


def _text(value: Any) -> str:
    return fingerprint.shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), 5_000)
