"""Asking the nodes of a cluster."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from speechdistill import cli
from speechdistill.engine import cluster
from speechdistill.io.errors import RunError


def refuse() -> None:
    raise PermissionError("not here")


def test_every_node_answers_or_says_why_not(local_ray: None) -> None:
    (raylet,) = cluster.on_every_node(os.getppid).values()
    assert isinstance(raylet, int) and raylet != os.getppid()
    (answer,) = cluster.on_every_node(refuse).values()
    assert isinstance(answer, PermissionError) and "not here" in str(answer)


def test_the_use_of_gpus_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cluster.node_use()[1] == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 90\necho 5\n")
    tool.chmod(0o755)
    assert cluster.node_use()[1] == [0.9, 0.05]
    tool.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert cluster.node_use()[1] == []


def test_workers_import_nothing_from_the_drivers_current_folder(local_ray: None) -> None:
    (paths,) = cluster.on_every_node(lambda: list(sys.path)).values()
    assert isinstance(paths, list) and not {"", str(Path.cwd())} & set(paths)
    assert str(Path(cli.__file__).parents[1]) in paths


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not joined any."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)


ABSENT = {
    "127.0.0.1:6399": "refused",
    "ray://127.0.0.1:10001": "refused",
    "nohost.invalid:6379": "nohost.invalid",
    "nonsense": "nonsense",
    "ray://nonsense": "invalid",
    "http://127.0.0.1:8265": "for `ray job submit`; give HOST:PORT or auto",
}


@pytest.mark.parametrize("address", ABSENT)
def test_an_address_where_nobody_answers_is_told_at_once(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], without_ray: None
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address)
    (tmp_path / "clip.wav").touch()
    assert cli.main(["ingest", "--speech", str(tmp_path), "--out", f"{tmp_path}/out"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith(f"error: RAY_ADDRESS={address}: no Ray cluster can be joined there (")
        and ABSENT[address] in line
    )
    assert line.endswith("correct RAY_ADDRESS (and RAY_AUTH_TOKEN), or unset it to use this machine alone")


def test_a_port_that_is_open_and_no_rays_is_told(monkeypatch: pytest.MonkeyPatch, without_ray: None) -> None:
    monkeypatch.setattr(cluster, "_ANSWERS_WITHIN_S", 0.5)
    with socket.create_server(("", 0)) as silent:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(RunError, match="is open, but does not answer as Ray"):
            cluster.connect()


def test_a_temporary_folder_too_long_for_sockets_is_told(tmp_path: Path) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    code = "from speechdistill.engine import cluster; cluster.connect()"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"} | {"TMPDIR": str(long)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    line = run.stderr.splitlines()[-1]
    assert f"RunError: the path of the temporary folder {long} is too long for Ray's sockets" in line
    assert line.endswith("; set TMPDIR to a shorter folder, such as /tmp")
