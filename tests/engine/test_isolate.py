"""Work in a child process, asked from several threads."""

import colorsys
import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from speechdistill.engine.isolate import CannotWork, ChildDied, Isolated, Row


@dataclass
class Meets:
    """Answers when so many batches are worked on at once. A row 0 kills the process."""

    batches: int
    _all: threading.Barrier = field(init=False)

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        if len(rows) > 1:  # rows that are tried alone meet nobody
            self._all.wait(timeout=60)
        if any(row["id"] == 0 for row in rows):
            os.kill(os.getpid(), signal.SIGKILL)
        return [{"twice": 2 * row["id"]} for row in rows]


def meets() -> Meets:
    made = Meets(2)
    made._all = threading.Barrier(2)
    return made


def batches(*of: list[int]) -> list[list[Row]]:
    return [[{"id": i} for i in ids] for ids in of]


def test_a_child_works_on_several_batches_at_once() -> None:
    work = Isolated(meets, calls=2)
    with ThreadPoolExecutor(2) as threads:
        answers = list(threads.map(work, batches([1, 2], [3, 4], [5, 6], [7, 8])))
    assert answers == [[{"twice": 2 * i}, {"twice": 2 * i + 2}] for i in (1, 3, 5, 7)]
    assert work.cpu_s > 0


def test_a_row_that_kills_the_child_takes_none_of_another_batch_with_it() -> None:
    work = Isolated(meets, calls=2)
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(work, batches([1, 2], [0, 3]))
    assert first == [{"twice": 2}, {"twice": 4}]
    killer, other = second
    assert isinstance(killer, ChildDied) and "SIGKILL" in str(killer)
    assert other == {"twice": 6}


def test_a_child_that_gives_no_answer_is_ended() -> None:
    work = Isolated(meets, timeout_s=5, calls=2)  # a batch that meets nobody
    (one, two) = work(batches([1, 2])[0])
    assert (one, two) == ({"twice": 2}, {"twice": 4}), "tried alone"


def test_what_cannot_be_made_is_told() -> None:
    def fails() -> Meets:
        raise OSError("no weights here")

    with pytest.raises(CannotWork, match="OSError: no weights here"):
        Isolated(fails)


def test_a_child_imports_nothing_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def imports() -> Callable[[list[Row]], list[Row | Exception]]:
        import colorsys

        return lambda rows: [{"file": colorsys.__file__} for _ in rows]

    (tmp_path / "colorsys.py").write_text("raise SystemExit(1)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", str(tmp_path), *sys.path])
    assert Isolated(imports)([{}]) == [{"file": colorsys.__file__}]
