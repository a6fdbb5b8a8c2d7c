"""The wheel works where it is installed, and the jobs work in a checkout that is not."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.server
def test_the_wheel_works_elsewhere_with_its_schemas(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True)
    for file in listed.stdout.split():
        if not (ROOT / file).is_symlink() and (ROOT / file).exists():
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            (source / file).write_bytes((ROOT / file).read_bytes())
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(source)], check=True)
    (wheel,) = tmp_path.glob("speechdistill-*.whl")
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import platform, speechdistill; from speechdistill import cli; from speechdistill.io import table;"
        "print(speechdistill.__file__, len(table.schema('pseudolabel.v1')), platform.system())"
    )
    run = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"]
    printed = subprocess.run(run, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.split()
    assert Path(printed[0]).is_relative_to(site) and printed[1:] == ["16", "Linux"]
    entries = (site / next(site.glob("*.dist-info")) / "entry_points.txt").read_text()
    assert "speechdistill = speechdistill.cli:entry" in entries


@pytest.mark.server
def test_jobs_explain_themselves_without_an_installation(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    for job, words in (("ingest", "--rir"), ("pseudolabel", "--max-reject-share"), ("demo", "--num-samples")):
        command = [sys.executable, str(ROOT / "jobs" / f"{job}.py"), "--help"]
        run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert run.returncode == 0 and words in run.stdout, run.stderr


@pytest.mark.server
def test_wrong_usage_exits_2_and_failures_exit_1_with_the_fix(tmp_path: Path) -> None:
    job = [sys.executable, str(ROOT / "jobs" / "pseudolabel.py")]
    assert subprocess.run([*job, "--clips"], capture_output=True).returncode == 2
    missing = [*job, "--clips", str(tmp_path / "none.parquet"), "--out", str(tmp_path / "out")]
    run = subprocess.run(missing, capture_output=True, text=True)
    assert run.returncode == 1 and "error: " in run.stderr and "no such file" in run.stderr
    assert "Traceback" not in run.stderr and not (tmp_path / "out").exists()
