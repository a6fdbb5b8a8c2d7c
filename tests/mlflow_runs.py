"""MLflow stores with runs and students for tests."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from mlflow import MlflowClient

from manifests import voice
from speechdistill.models.networks.conv_transformer import ConvTransformer, ConvTransformerConfig
from speechdistill.models.student import save_student

TINY = ConvTransformerConfig(max_channels=4, stride_convs=4, dim=8, heads=2, layers=1)
PROVENANCE = {"shards": {"labels/manifest.parquet": "5e1f"}, "teacher_sha256": "b18b", "git_commit": "77e141e"}


def student(folder: Path, seed: int = 0, config: ConvTransformerConfig = TINY) -> str:
    """The folder of a checkpoint with random weights, which make scores differ from clip to clip."""
    torch.manual_seed(seed)
    network = ConvTransformer(config).eval()
    last = network.transformer_pool_attn.pool.linear3
    reference = torch.from_numpy(voice(7.68, seed=99))[None]
    with torch.no_grad():
        last.weight.mul_(200)
        last.bias.sub_(network(reference))  # its score is 3
    save_student(network, str(folder), PROVENANCE)
    return str(folder)


class Store:
    """An MLflow with one experiment: a server's URL, or sqlite in a folder."""

    def __init__(self, place: Path | str) -> None:
        self.uri = place if isinstance(place, str) else f"sqlite:///{place}/mlflow.db"
        self.client: Any = MlflowClient(tracking_uri=self.uri)
        files = None if isinstance(place, str) else (place / "mlartifacts").as_uri()
        self.experiment = self.client.create_experiment("students", files)

    def run(self, parent: str | None = None, status: str = "FINISHED", **metrics: float) -> str:
        """The ID of a new run that has ended."""
        tags = {"mlflow.parentRunId": parent} if parent else {}
        run = str(self.client.create_run(self.experiment, tags=tags).info.run_id)
        for key, value in metrics.items():
            self.client.log_metric(run, key, value)
        self.client.set_terminated(run, status)
        return run


@contextmanager
def serving(address: str, uri: str, folder: Path) -> Iterator[str]:
    """The URL of a real `mlflow models serve` of a model, which is stopped afterwards."""
    with _running(["models", "serve", "--model-uri", address, "--env-manager", "local"], uri, folder, "ping") as url:
        yield url


@contextmanager
def tracking_server(folder: Path) -> Iterator[str]:
    """The URL of a real `mlflow server` that stands between its clients and its files."""
    options = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/artifacts"]
    with _running(["server", *options, "--workers", "1"], "", folder, "health") as url:
        yield url


@contextmanager
def _running(command: list[str], uri: str, folder: Path, health: str) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}", folder / "server.log"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    environment["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] = "false"  # five more processes that nobody needs here
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"  # where it looks for uvicorn
    if uri:
        environment["MLFLOW_TRACKING_URI"] = uri
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *command, "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + 400
        while not _answers(f"{url}/{health}"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            threading.Event().wait(0.1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group that this process began
        process.wait()


class Gateway:
    """A server's second address, which can be stopped and started again: to clients, the server's outage."""

    def __init__(self, url: str) -> None:
        self._server = ("127.0.0.1", int(url.rpartition(":")[2]))
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._address = free.getsockname()
        self.uri = f"http://127.0.0.1:{self._address[1]}"
        self.start()

    def start(self) -> None:
        self._listener = socket.create_server(self._address)
        self._open: list[socket.socket] = []
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def stop(self) -> None:
        for end in (self._listener, *self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes the threads that wait on it
            end.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client = listener.accept()[0]
                server = socket.create_connection(self._server)
                self._open += [client, server]
                for pair in ((client, server), (server, client)):
                    threading.Thread(target=_pass_on, args=pair, daemon=True).start()


def _pass_on(source: socket.socket, sink: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    with suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False
