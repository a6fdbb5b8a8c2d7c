"""Calls to MLflow: repeated after what passes, not after what stays."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from speechdistill.tracking import mlflow_client
from speechdistill.tracking.mlflow_client import PatientClient

BODIES = {
    200: {"run": {"info": {"run_id": "r1"}, "data": {}}},
    400: {"error_code": "INVALID_PARAMETER_VALUE"},
    404: {"error_code": "RESOURCE_DOES_NOT_EXIST"},
}


@contextmanager
def answering(*statuses: int) -> Iterator[tuple[str, list[str]]]:
    """A server that gives these answers one after the other, the last for ever; yields its URL and what was asked."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = statuses[min(len(asked), len(statuses) - 1)]
            asked.append(self.path)
            body = json.dumps(BODIES.get(status, {})).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_client, "_PAUSES_S", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_call_is_repeated_after_a_temporary_error(status: int) -> None:
    with answering(status, status, 200) as (uri, asked):
        assert PatientClient(uri).get_run("r1").info.run_id == "r1"
    assert len(asked) == 3


@pytest.mark.parametrize(("status", "times"), [(404, 1), (400, 1), (503, 4)])
def test_a_lasting_error_is_raised(status: int, times: int) -> None:
    from mlflow.exceptions import MlflowException

    with answering(status) as (uri, asked), pytest.raises(MlflowException):
        PatientClient(uri).get_run("r1")
    assert len(asked) == times


def test_a_silent_server_is_asked_once() -> None:
    tries: list[int] = []

    def call() -> None:
        tries.append(1)
        raise TimeoutError("no answer")

    with pytest.raises(TimeoutError):
        mlflow_client.patiently(call)
    assert len(tries) == 1
