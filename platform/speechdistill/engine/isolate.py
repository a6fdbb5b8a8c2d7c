"""A worker in a child process: a row that kills its process is rejected alone, and the actor lives on.

The child ends with its stdin, so it never outlives the actor that started it, and its memory is limited.
"""

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from speechdistill.io.errors import UserError

Row = dict[str, Any]
Worker = Callable[[list[Row]], list[Row | Exception]]


# An object store that resets every connection is given up after nine minutes (ten tries of five).
_TIMEOUT_S = 720.0


class ChildDied(RuntimeError):
    """The child process ended, or did not answer in time (`hung`), while it worked on these rows."""

    hung = False


class CannotWork(RuntimeError):
    """The worker could not be made, or what all rows need is away: no row's fault."""


class CannotWorkByFault(CannotWork):
    """`CannotWork` for a fault of the program, whose traceback the user is to see."""


def cannot_work(error: Exception) -> CannotWork:
    """`CannotWork` with the text of its cause; what a user or a machine can cause is no fault of the program."""
    is_fault = not isinstance(error, (UserError, OSError, ChildDied))
    return (CannotWorkByFault if is_fault else CannotWork)(f"{type(error).__name__}: {error}")


class Isolated:
    """A `Worker` whose work happens in a child process made with `make`.

    When the child dies, its rows are tried again one by one, each at most twice in a fresh child; a row that
    kills it again, or lets it hang once more, becomes a `ChildDied` in the result. Where `make` fails, now or in a
    later child, `CannotWork` is raised with its reason. `memory_gb` limits the child's own memory; `cpu_s` is the
    CPU time of all its children.
    """

    def __init__(
        self, make: Callable[[], Worker], memory_gb: float | None = None, timeout_s: float = _TIMEOUT_S
    ) -> None:
        self._make = cloudpickle.dumps(make)
        self._memory_bytes = int(memory_gb * 2**30) if memory_gb else resource.RLIM_INFINITY
        self._timeout_s = timeout_s
        self._child: subprocess.Popen[bytes] | None = None
        self.cpu_s = self._cpu_s_of_child = 0.0
        self._ask(None)

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        try:
            return self._ask(rows)
        except ChildDied:
            return [self._alone(row) for row in rows]

    def _alone(self, row: Row) -> Row | Exception:
        died: ChildDied | None = None
        for _ in range(2):
            try:
                return self._ask([row])[0]
            except ChildDied as error:
                died = error
                if error.hung:  # it has cost two timeouts by now
                    break
        assert died is not None
        return died

    def _ask(self, rows: list[Row] | None) -> list[Row | Exception]:
        if self._child is None:
            self._begin()
        return self._answer(rows) if rows else []

    def _begin(self) -> None:
        """Start a child; one that dies at once, with its node or for want of memory, is started again."""
        for tries_left in (2, 1, 0):
            try:
                self._start()
                self._answer(None)
                return
            except Exception as error:
                if not tries_left or not isinstance(error, (ChildDied, OSError)):
                    raise cannot_work(error) from error

    def _answer(self, rows: list[Row] | None) -> list[Row | Exception]:
        try:
            if rows is not None:
                self._connection.send(rows)
            if not self._connection.poll(self._timeout_s):
                raise self._died(f"gave no answer for {self._timeout_s:.0f} s")
            answer, cpu_s = self._connection.recv()
        except (EOFError, OSError) as error:
            raise self._died("ended") from error
        self.cpu_s += cpu_s - self._cpu_s_of_child
        self._cpu_s_of_child = cpu_s
        if isinstance(answer, Exception):
            raise answer
        return answer or []

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        code = "from speechdistill.engine.isolate import child; child()"
        command = [sys.executable, "-c", code, str(theirs.fileno()), str(self._memory_bytes)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with theirs:
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], env=environment)
        self._connection.send_bytes(self._make)
        self._cpu_s_of_child = 0.0

    def _died(self, how: str) -> ChildDied:
        assert self._child is not None
        self._child.kill() if how != "ended" else None
        code = self._child.wait()
        self._child = None
        self._connection.close()
        if how == "ended":
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        died = ChildDied(f"the process working on this row {how}; listen to its source file, or leave the file out")
        died.hung = how.startswith("gave no answer")
        return died


def child() -> None:
    """The child's main loop; its arguments are the connection's descriptor and the memory limit in bytes."""
    connection = Connection(int(sys.argv[1]))
    memory_bytes = int(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        work: Worker = pickle.loads(connection.recv_bytes())()
    except Exception as error:
        error.add_note(f"In the child process:\n{traceback.format_exc()}")
        connection.send((_portable(error), time.process_time()))
        os._exit(1)  # a normal exit would wait for the thread that holds stdin
    connection.send((None, time.process_time()))
    while True:
        try:
            rows = connection.recv()
        except EOFError:
            os._exit(0)
        try:
            answer: Any = [_portable(r) if isinstance(r, Exception) else r for r in work(rows)]
        except Exception as error:
            answer = _portable(error)
        connection.send((answer, time.process_time()))


def _end_with_stdin() -> None:
    os.read(0, 1)
    os._exit(0)


def _portable(error: Exception) -> Exception:
    """The error if it survives pickling, else its text: an answer must always arrive."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
