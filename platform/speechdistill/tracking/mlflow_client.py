"""The client of MLflow: limits of a request, set once for the process, and repeated calls."""

import os
import re
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")

# MLflow reads its limits from the environment at each request, so one value serves points and uploads. The timeout
# limits silence: a server that has received a gigabyte of weights answers once its own storage has them.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "300",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # `Sender` and `patiently` repeat calls: seven of MLflow's take minutes
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # the URL may hold a password
}
_PAUSES_S = (0.5, 1.0, 2.0, 4.0)
_TEMPORARY = ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED")


def client(uri: str) -> Any:
    """Return MLflow's client of the server or database at `uri`; each call is one request."""
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


class PatientClient:
    """MLflow's client; its calls are repeated as `patiently` does."""

    def __init__(self, uri: str) -> None:
        self._client = client(uri)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(patiently, getattr(self._client, name))


def patiently(call: Callable[..., T], *arguments: Any, **named: Any) -> T:
    """Return what `call` returns; repeat it for 8 s after a refused connection or a server's temporary error."""
    for pause_s in _PAUSES_S:
        try:
            return call(*arguments, **named)
        except Exception as error:
            if not _is_temporary(error):
                raise
            time.sleep(pause_s)
    return call(*arguments, **named)


def is_timeout(error: Exception) -> bool:
    """Whether a server was silent for the time limit of a request."""
    return isinstance(error, TimeoutError) or "timeout exception" in str(error)


def failure(uri: str, error: Exception) -> str:
    """Return one text that names the server and the error, without passwords."""
    return f"MLflow at {without_password(uri)}: {without_password(str(error))}"


def without_password(text: str) -> str:
    """Return the text without the users and passwords of its URLs."""
    return re.sub(r"(?<=//)([^/@\s]*|[^:/@\s]+:[^@\s]*)@", "", text)


def _is_temporary(error: Exception) -> bool:
    from mlflow.exceptions import MlflowException, RestException

    # MLflow's own errors, such as an artifact that is not there, have the code INTERNAL_ERROR as well.
    is_answer = isinstance(error, RestException) or "API request to" in str(error)
    is_known = is_answer and isinstance(error, MlflowException) and error.error_code in _TEMPORARY
    return (is_known or isinstance(error, ConnectionError)) and not is_timeout(error)
