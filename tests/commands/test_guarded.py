"""How commands end: a user's error is one line, a fault of the program keeps its traceback."""

import pytest

from speechdistill import cli
from speechdistill.commands import promote
from speechdistill.io.errors import UserError

PROMOTE = ["promote", "--run", "r", "--eval", "e"]


def raising(error: BaseException) -> object:
    def run(config: object) -> None:
        raise error

    return run


def test_a_users_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(promote, "run", raising(UserError("no such run", "give another")))
    assert cli.main(PROMOTE) == 1
    assert capsys.readouterr().err == "error: no such run; give another\n"


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, OSError, ImportError])
def test_a_fault_of_the_program_keeps_its_traceback(kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promote, "run", raising(kind("shape mismatch")))
    with pytest.raises(kind, match="shape mismatch"):
        cli.main(PROMOTE)


def test_ctrl_c_says_what_it_leaves(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(promote, "run", raising(KeyboardInterrupt()))
    assert cli.main(PROMOTE) == 130
    assert "stopped; the same command resumes" in capsys.readouterr().err
