"""Files of the user's current folder are no part of the program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from speechdistill.io import import_path

PLATFORM = Path(import_path.__file__).parents[2]


def test_the_current_folder_is_left_out_however_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    here = ["", ".", str(tmp_path), f"{tmp_path}/link", f"{tmp_path}/"]
    assert import_path.without_current_folder([*here, "/elsewhere", f"{tmp_path}/below"]) == [
        "/elsewhere",
        f"{tmp_path}/below",
    ]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["/elsewhere", *here]))
    assert import_path.in_environment() == ["/elsewhere"]


def test_the_folders_of_the_program_stay_where_they_are_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (str(PLATFORM), str(Path(os.__file__).parent)):
        monkeypatch.chdir(folder)
        assert import_path.without_current_folder(["", folder]) == [folder]


def test_the_driver_imports_nothing_from_there(tmp_path: Path) -> None:
    for name in ("av", "soundfile", "tyro", "pyarrow", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the current folder')\n")
    code = "from speechdistill import cli; cli.main(['recipe', 'show', 'as_is'])"
    environment = {**os.environ, "PYTHONPATH": f"{os.pathsep}{PLATFORM}"}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, ""), run.stderr
