"""The battery for a machine with a GPU, where there is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "on_gpu.sh"
SECTIONS = ["correct", "teacher", "job", "train", "prune"]


def battery(out: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    environment = {**os.environ, "OUT": str(out), "PYTHON": sys.executable}
    run = subprocess.run(["bash", str(SCRIPT), *options], env=environment, capture_output=True, text=True)
    file = out / "figures.jsonl"
    return run, [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def test_help_names_the_sections_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    run, _ = battery(tmp_path, "--help")
    assert run.returncode == 0 and "correct teacher job train prune science" in run.stdout
    run, figures = battery(tmp_path, "speed")
    assert run.returncode == 2 and "no section speed" in run.stderr and not figures


@pytest.mark.server
def test_a_section_that_fails_says_why_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run, figures = battery(tmp_path)
    ended = {figure["section"]: figure["value"] for figure in figures if figure["name"] == "the section"}
    assert ended == dict.fromkeys(SECTIONS, "failed: no GPU here; --device cpu --debug runs the same code")
    assert all(f"| {section} | the section | failed: no GPU here" in run.stdout for section in SECTIONS)


@pytest.mark.slow
@pytest.mark.ray
def test_all_of_it_runs_on_a_cpu_at_toy_size(tmp_path: Path, real_audio: Path) -> None:
    run, figures = battery(tmp_path, "--device", "cpu", "--debug", *SECTIONS, "science")
    ended = {figure["section"]: figure["value"] for figure in figures if figure["name"] == "the section"}
    assert ended == dict.fromkeys([*SECTIONS, "science"], "whole"), run.stdout[-3000:]
    told = {(figure["section"], figure["name"]) for figure in figures}
    for wanted in (
        ("correct", "tests passed"),
        ("teacher", "2,600 h of audio"),
        ("job", "two teachers, one killed: rate / the slower stage alone"),
        ("train", "v0 through Ray Train / bare"),
        ("prune", "half of heads and neurons: time / whole"),
        ("science", "share of the way from labeled-only to the teacher"),
    ):
        assert wanted in told
