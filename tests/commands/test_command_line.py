"""The command line as a whole: its help, its version, and what importing the package brings."""

import re
import subprocess
import sys
from itertools import pairwise

import pytest

import speechdistill
from speechdistill import cli


def help_of(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    return re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)


def test_the_help_has_a_line_for_each_command_in_the_order_of_use(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line.strip("│ ") for line in help_of(capsys, monkeypatch).splitlines()]
    shown = [re.match(r"• ([\w-]+) +(\w.*)", line) for line in lines if line.startswith("•")]
    assert [match and match[1] for match in shown] == list(cli.COMMANDS)
    assert list(cli.COMMANDS) == [
        *("ingest", "pseudolabel", "train-teacher", "train-students", "prune", "promote", "score", "compare"),
        *("recipe", "shards", "sync", "doctor"),
    ]


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_paragraphs_of_help_are_broken_at_the_margin_alone(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(capsys, monkeypatch, command)
    width = 100
    boxed = [line.strip("│").rstrip() for line in text.splitlines() if line.startswith("│")]
    for line, following in pairwise(boxed):
        if line.startswith(" " * 20) and following.startswith(" " * 20):
            word = following.split()[0]
            assert len(line) + 1 + len(word) > width - 6, f"{line!r} had room for {word!r}"


def test_the_version_and_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"speechdistill {speechdistill.__version__}\n"
    run = subprocess.run([sys.executable, "-m", "speechdistill", "--version"], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"speechdistill {speechdistill.__version__}\n")


def test_an_unknown_command_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["labels"])
    assert ended.value.code == 2


def test_the_package_shows_what_is_public() -> None:
    assert dir(speechdistill) == ["__version__", "load"]


@pytest.mark.server  # seconds: a process for each command
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_imports_neither_ray_nor_torch_nor_mlflow(command: str) -> None:
    code = (
        "import contextlib, sys\nfrom speechdistill import cli\n"
        f"with contextlib.suppress(SystemExit): cli.main([{command!r}, '--help'])\n"
        "print([name for name in ('ray', 'torch', 'mlflow', 'aiohttp') if name in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"
