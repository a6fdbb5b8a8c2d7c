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
from speechdistill import student_files
from speechdistill.students.conv_transformer import ConvTransformer, ConvTransformerConfig

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
    student_files.save(network, str(folder), PROVENANCE)
    return str(folder)


class Store:
    """A sqlite MLflow in a folder with one experiment."""

    def __init__(self, folder: Path) -> None:
        self.uri = f"sqlite:///{folder}/mlflow.db"
        self.client: Any = MlflowClient(tracking_uri=self.uri)
        self.experiment = self.client.create_experiment("students", (folder / "mlartifacts").as_uri())

    def run(self, parent: str | None = None, status: str = "FINISHED", **metrics: float) -> str:
        """The ID of a new run that has ended."""
        tags = {"mlflow.parentRunId": parent} if parent else {}
        run = str(self.client.create_run(self.experiment, tags=tags).info.run_id)
        for key, value in metrics.items():
            self.client.log_metric(run, key, value)
        self.client.set_terminated(run, status)
        return run


@contextmanager
def serving(address: str, uri: str, log: Path) -> Iterator[str]:
    """The URL of a real `mlflow models serve` of a model, which is stopped afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", address, "--env-manager", "local"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    commands = Path(sys.executable).parent  # where it looks for uvicorn
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=log.parent,
            env={**os.environ, "MLFLOW_TRACKING_URI": uri, "PATH": f"{commands}:{os.environ['PATH']}"},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while not _answers(f"{url}/ping"):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            threading.Event().wait(0.1)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the group that this process began
        process.wait()


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(url, timeout=5) as answer:
        return bool(answer.status == 200)
    return False
