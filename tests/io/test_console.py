"""Printing: no encoding of a terminal and no reader that has gone ends a program."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

_PRINTS = """
import logging, os, sys, warnings
from tqdm import tqdm
from speechdistill.io import console
console.make_lasting()
logging.basicConfig()
for number in tqdm(range(300), mininterval=0):
    print("Björk", number, "█" * 1000, flush=True)
    logging.warning("%s", "ü" * 1000)
os.system("echo from a child; echo from a child >&2")
open(sys.argv[1], "w").write(f"done {console.printed('x')}")
"""


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_no_closed_pipe_and_no_encoding_ends_a_program(tmp_path: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "LANG": "C"}
    program = [sys.executable, "-c", _PRINTS, str(tmp_path / "end")]
    pipe = subprocess.PIPE
    run = subprocess.Popen(program, stdout=pipe, stderr=subprocess.STDOUT, env=environment)
    assert run.stdout
    run.stdout.read(10)
    run.stdout.close()
    assert run.wait(60) == 0
    assert (tmp_path / "end").read_text() == "done False"
    whole = subprocess.run(program, capture_output=True, env=environment, check=True).stdout.decode()
    assert ("Bj\\xf6rk 299" if encoding == "ascii" else "Björk 299") in whole and whole.count("from a child") == 1


def test_a_program_without_streams_prints_nothing(tmp_path: Path) -> None:
    command = f'"{sys.executable}" -c "$0" "$1" >&- 2>&-'
    subprocess.run(["sh", "-c", command, _PRINTS, str(tmp_path / "end")], check=True)
    assert (tmp_path / "end").read_text() == "done True"


def test_output_that_a_full_disk_does_not_take_is_an_error(tmp_path: Path) -> None:
    code = """
import sys
from speechdistill.io import console
from speechdistill.io.errors import StorageError
console.make_lasting()
print("x" * 10_000, file=sys.stderr)
assert not console.printed("x")
try:
    print("x")
except StorageError as error:
    raise SystemExit(str(error))
"""
    with Path("/dev/full").open("w") as full:
        run = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
        assert subprocess.run([sys.executable, "-c", code], stdout=full, stderr=full).returncode == 1
    assert run.returncode == 1 and "printing failed ([Errno 28] No space left on device)" in run.stderr
    assert run.stderr.count("\n") == 2
