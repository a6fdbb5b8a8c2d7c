"""README and docs/: their commands parse, those in ```bash blocks run, their links lead somewhere, their Python works.

A ```bash block is run here, as a reader types it. A ```console block shows a command with its output, or a command that
needs another machine: only its options are checked. A comment before a block says otherwise: `<!-- runs: slow -->` for
one that starts a Ray, `<!-- not run: REASON -->` for one that cannot run here.
"""

import contextlib
import io
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml

import manifests
from speechdistill import cli, commands
from speechdistill.io import audio

ROOT = Path(__file__).parents[1]
README, CONTRIBUTING = ROOT / "README.md", ROOT / "CONTRIBUTING.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
FILES = [README, *PAGES]

NOTE = r"^(?:<!-- *(?P<note>[^\n]*?) *-->\n)?"
FENCE = re.compile(NOTE + r"```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"`([^`\n]+)`")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*")
SHELL_SIGN = re.compile(r"\d?[<>|&;]+\d?|\d?>&\d")
OTHER_PROGRAMS = ("benchmarks/", "git ", "kubectl ", "mlflow ", "pip ", "ray ")


class Block(NamedTuple):
    file: Path
    line: int
    kind: str  # bash, console, python, or nothing
    note: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.file.name}:{self.line}"

    def commands(self) -> list[str]:
        """Return what a reader types, one command a line."""
        text = self.text
        if self.kind == "console":
            typed, more = [], False
            for line in text.splitlines():
                if more or line.startswith("$ "):
                    typed.append(line.removeprefix("$ "))
                    more = line.endswith(("\\", "|"))
            text = "\n".join(typed)
        joined = text.replace("\\\n", " ").replace("|\n", "| ")
        return [line for line in joined.splitlines() if line.strip()]


def blocks(file: Path) -> Iterator[Block]:
    text = file.read_text()
    for match in FENCE.finditer(text):
        yield Block(file, text.count("\n", 0, match.start("text")), match["kind"], match["note"] or "", match["text"])


BLOCKS = [block for file in FILES for block in blocks(file)]
MARKS = {"runs: slow": (pytest.mark.slow, pytest.mark.ray)}


def of_kind(kind: str) -> list[Any]:
    chosen = [block for block in BLOCKS if block.kind == kind and not block.note.startswith("not run:")]
    return [pytest.param(one, id=one.name, marks=MARKS.get(one.note, ())) for one in chosen]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recordings and the label run that the pages name, as the current one."""
    root = manifests.corpus(tmp_path / "place", speech=3)
    (root / "speech").rename(root / "clean")
    for name in ("interview.wav", "call.wav", "podcasts/one.wav", "calls/monday/two.flac"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(root / name, manifests.voice(3.0), 16000)
    _write_labels(root / "labels" / "shards")
    programs = tmp_path / "bin"
    programs.mkdir()
    entry = '-c "from speechdistill.cli import entry; entry()"'
    for name, words in (("python", ""), ("speechdistill", entry)):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    source = os.pathsep.join([str(ROOT / "platform"), os.environ["PYTHONPATH"]])
    for name, value in (("HOME", tmp_path), ("PYTHONPATH", source), ("PATH", f"{programs}:{os.environ['PATH']}")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(root)
    return root


def _write_labels(shards: Path) -> None:
    """Write a label run's shards with audio as FLAC, the default."""
    shards.mkdir(parents=True)
    for file in (ROOT / "tests/fixtures/446974e/labels_complete/shards").glob("*.parquet"):
        rows = pq.read_table(file)
        waves = [np.frombuffer(data, "<i2") for data in rows["audio"].to_pylist()]
        coded = pa.array([audio.encode(wave, "flac") for wave in waves], pa.binary())
        pq.write_table(rows.set_column(rows.column_names.index("audio"), "audio", coded), shards / file.name)


@pytest.mark.parametrize("block", of_kind("bash"))
def test_bash_blocks_run(block: Block, place: Path) -> None:
    lines = block.commands()
    if not block.note and all(re.fullmatch(r"speechdistill [^|><;&$~\\]+", line) for line in lines):
        for line in lines:  # no shell is needed, and this process has imported everything
            assert _exit_code(shlex.split(line, comments=True)[1:]) == 0, line
        return
    script = "\n".join(lines)
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("block", of_kind("python"))
def test_python_blocks_run(block: Block, place: Path) -> None:
    exec(compile(block.text, block.name, "exec"), {"__name__": "__main__"})


def test_commands_have_the_options_that_pages_give_them(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Each `speechdistill …` and `python jobs/….py` of any block is parsed and checked, but does nothing."""
    for module in (
        import_module(f"speechdistill.commands.{one.name}") for one in pkgutil.iter_modules(commands.__path__)
    ):
        if hasattr(module, "command"):
            monkeypatch.setattr(module, "command", wraps(module.command)(lambda *_, **__: 0))
    shells = [block for block in BLOCKS if block.kind in ("bash", "console")]
    found = [(block, words) for block in shells for line in block.commands() for words in _ours(line)]
    assert {"ingest", "pseudolabel", "train-students", "score", "compare", "promote"} <= {
        words[0] for _, words in found
    }
    for block, words in found:
        assert _exit_code(words) == 0, f"{block.name}: speechdistill {shlex.join(words)}\n{capfd.readouterr().err}"


def _ours(line: str) -> Iterator[list[str]]:
    """Yield the arguments of each of this package's commands on a line of a shell."""
    words = [";" if SHELL_SIGN.fullmatch(word) else word for word in shlex.split(line, comments=True)]
    for i, word in enumerate(words):
        end = words.index(";", i) if ";" in words[i:] else len(words)
        job = re.fullmatch(r"jobs/(\w+)\.py", word)
        if job and words[i - 1] == "python":
            yield [job[1].replace("_", "-"), *words[i + 1 : end]]
        elif word == "speechdistill" and words[i - 1] != "-m" and not words[i + 1].startswith("--"):
            yield words[i + 1 : end]


def test_options_in_the_text_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    known = set(OPTION.findall(_help()))
    assert {"--clips", "--variants", "--seed"} <= known
    known |= {"--version", "--help", "--tyro-print-completion"}
    scripts = [*(ROOT / "benchmarks").glob("*.sh"), ROOT / "Makefile"]
    known |= {option for script in scripts for option in OPTION.findall(script.read_text())}
    for file in FILES:
        for code in INLINE.findall(FENCE.sub("", file.read_text())):
            if not code.startswith(OTHER_PROGRAMS):
                assert set(OPTION.findall(code)) <= known, f"{file.name}: {code}"


def _help(command: str = "") -> str:
    """Return what `--help` prints for a command and for those below it."""
    with contextlib.redirect_stdout(io.StringIO()) as told:
        assert _exit_code([*command.split(), "--help"]) == 0
    text = told.getvalue()
    return text + "".join(_help(f"{command} {name}") for name in re.findall(r"• ([a-z-]+)", text))


def _exit_code(words: list[str]) -> int:
    try:
        return cli.main(words)
    except SystemExit as end:  # of tyro: after --help, and for wrong options
        return int(end.code or 0)


@pytest.mark.parametrize("file", [*FILES, CONTRIBUTING], ids=lambda file: file.name)
def test_links_and_named_files_exist(file: Path) -> None:
    text = FENCE.sub("", file.read_text())
    for target in LINK.findall(text):
        if re.match(r"\w+:", target):
            continue
        path, _, anchor = target.partition("#")
        page = (file.parent / path).resolve() if path else file
        assert page.is_file() and page.is_relative_to(ROOT), target
        assert not anchor or anchor in _anchors(page), target
    for code in INLINE.findall(text):
        name = code.partition(" ")[0]
        if re.match(r"(benchmarks|docs|jobs|platform|schemas|tests)/", name) and not re.search(r"[A-Z]{2}|[*…]", name):
            assert (ROOT / name).exists(), code


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_begin_with_a_command_and_end_with_what_can_go_wrong(page: Path) -> None:
    first = next(blocks(page))
    assert first.line <= 10 and first.kind == "console" and first.text.startswith("$ ")
    sections = re.findall(r"^## (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    assert sections[-1] == "What can go wrong"


def test_the_readme_is_short_and_every_page_is_listed() -> None:
    assert len(README.read_text().splitlines()) <= 200
    entries = [entry for group in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"] for entry in group.values()]
    listed = [page for entry in entries for page in (entry if isinstance(entry, list) else [entry])]
    assert sorted(listed) == [page.name for page in PAGES]


def test_blocks_that_cannot_run_are_rare() -> None:
    assert sum(block.note.startswith("not run:") for block in BLOCKS) <= 3
    assert {block.note for block in BLOCKS if not block.note.startswith("not run:")} <= {"", *MARKS}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_pages_name_no_folder_of_the_machine_they_were_written_on(file: Path) -> None:
    assert not re.search(r"/(tmp|work|home|root)/|@@", file.read_text())


def test_pictures_are_small() -> None:
    pictures = [file for file in (ROOT / "docs").iterdir() if file.suffix in (".png", ".svg", ".webp")]
    assert pictures and all(file.stat().st_size <= 150_000 for file in pictures)
