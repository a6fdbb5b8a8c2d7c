"""Asking the nodes of a cluster."""

import os
from pathlib import Path

import pytest

from speechdistill.engine import cluster


def refuse() -> None:
    raise PermissionError("not here")


def test_every_node_answers_or_says_why_not(local_ray: None) -> None:
    (raylet,) = cluster.on_every_node(os.getppid).values()
    assert isinstance(raylet, int) and raylet != os.getppid()
    (answer,) = cluster.on_every_node(refuse).values()
    assert isinstance(answer, PermissionError) and "not here" in str(answer)


def test_the_use_of_gpus_is_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cluster._gpu_use() == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 90\necho 5\n")
    tool.chmod(0o755)
    assert cluster._gpu_use() == [0.9, 0.05]
    tool.write_text("#!/bin/sh\necho '[N/A]'\n")
    assert cluster._gpu_use() == []


def test_one_node_shares_every_folder_with_itself(tmp_path: Path, local_ray: None) -> None:
    cluster.check_shared(str(tmp_path))
    assert not list(tmp_path.iterdir())
