"""`ray job submit` as a user types it, to a real cluster that wants a token and does not have the package."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import urllib.error
import urllib.request
import venv
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from manifests import corpus
from mlflow_runs import student
from speechdistill.commands import ingest
from speechdistill.commands.ingest import Ingest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Head:
    """A running head node: its dashboard, and the environment of a user who may use it."""

    address: str
    environment: dict[str, str]

    def submit(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--address", self.address]
        environment = {**self.environment, **more}
        words += ["--working-dir", ".", *command]
        return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # its sockets' names must be short
    # Everything that is installed here can be imported there, but for the project itself: a .pth file in a folder
    # that a .pth file names is not read.
    venv.create(folder / "venv", symlinks=True)
    site = next((folder / "venv").glob("lib/python*/site-packages"))
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "RAY_ADDRESS")}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PATH"] = f"{folder}/venv/bin{os.pathsep}{environment['PATH']}"
    gcs, dashboard, agent, client = free_ports(4)
    command = [f"{folder}/venv/bin/python", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={gcs}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}", f"--temp-dir={folder}/ray", "--object-store-memory=200000000"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True, cwd="/")
    head = Head(f"http://127.0.0.1:{dashboard}", environment)
    try:
        wait_until_ready(head, process, folder / "head.log")
        yield head
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.kill()  # its own way of ending them waits for half a minute
        for each in started:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_ready(head: Head, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(600):
        try:
            if status(head, head.environment["RAY_AUTH_TOKEN"]) == 200:
                return
        except OSError:
            pass
        try:
            process.wait(timeout=0.2)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(log.read_text()[-3000:])
    raise AssertionError(f"the head did not start\n{log.read_text()[-3000:]}")


def status(head: Head, token: str | None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{head.address}/api/jobs/", headers=headers)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    root = corpus(tmp_path_factory.mktemp("corpus"))
    summary = ingest.run(Ingest(out=str(root / "manifest"), speech=(str(root / "speech"),)))
    return str(summary.manifest)


def test_a_request_without_the_token_is_refused(head: Head) -> None:
    assert status(head, head.environment["RAY_AUTH_TOKEN"]) == 200
    assert status(head, None) == 401
    assert status(head, secrets.token_hex(32)) in (401, 403)
    run = head.submit("--", "python", "-c", "print('ran')", RAY_AUTH_TOKEN=secrets.token_hex(32))
    assert run.returncode != 0 and "ran\n" not in run.stdout


@pytest.mark.parametrize(
    "form", [["python", "jobs/pseudolabel.py"], pytest.param(["jobs/pseudolabel.py"], marks=pytest.mark.slow)]
)
def test_both_forms_of_submission_label(head: Head, clips: str, tmp_path: Path, form: list[str]) -> None:
    options = ["--clips", clips, "--out", str(tmp_path / "run"), "--num-samples", "4"]
    run = head.submit("--", *form, *options, "--teacher", student(tmp_path / "teacher"))
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "labelled 4 samples" in run.stdout
    assert pq.read_table(tmp_path / "run" / "shards")["sample_id"].to_pylist() == [0, 1, 2, 3]


def test_a_failing_job_exits_non_zero_with_its_reason_in_the_log(head: Head, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.parquet")
    run = head.submit("--", "python", "jobs/pseudolabel.py", "--clips", missing, "--out", str(tmp_path / "run"))
    assert run.returncode == 1
    assert f"error: {missing}: no such file" in run.stdout, run.stdout[-3000:]


@pytest.mark.slow
def test_a_job_without_options_needs_no_dashes(head: Head) -> None:
    run = head.submit("jobs/pseudolabel.py")
    assert run.returncode == 1 and "--clips" in run.stdout, run.stdout[-3000:]  # the script's own usage error


@pytest.mark.slow
def test_the_package_is_not_installed_on_the_cluster(head: Head) -> None:
    run = head.submit("--", "python", "-c", "import torch, ray; import speechdistill")
    assert run.returncode == 1 and "No module named 'speechdistill'" in run.stdout, run.stdout[-3000:]
