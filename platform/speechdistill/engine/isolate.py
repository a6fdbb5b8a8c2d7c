"""Workers in child processes: a row that kills its process is rejected alone, and the actor survives.

A child ends with its stdin, so no child outlives the actor that started it. Its memory is limited.
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
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import count
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from speechdistill.io import import_path
from speechdistill.io.errors import UserError

Row = dict[str, Any]
Worker = Callable[[list[Row]], list[Row | Exception]]


# Clients give up an object store that resets every connection after nine minutes (ten rounds of five tries).
_TIMEOUT_S = 720.0


class ChildDied(RuntimeError):
    """A child process that ended, or did not answer in time (`hung`), while it worked on these rows."""

    hung = False

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason, fix)
        self.reason = reason

    def __str__(self) -> str:
        return "; ".join(self.args)


class CannotWork(RuntimeError):
    """A worker that could not be made, or lacks something that all rows need. No row is at fault."""


class CannotWorkByFault(CannotWork):
    """`CannotWork` because of a fault of the program: the user gets the traceback."""


def cannot_work(error: Exception) -> CannotWork:
    """Return `CannotWork` with the text of its cause, or `CannotWorkByFault` if neither user nor machine caused it."""
    is_fault = not isinstance(error, (UserError, OSError, ChildDied))
    return (CannotWorkByFault if is_fault else CannotWork)(f"{type(error).__name__}: {error}")


class Isolated:
    """`Worker` that runs in a child process; `make` makes the worker there.

    After a child's death its rows are retried one by one, each at most twice in a new child. A row that kills the
    child again, or makes it hang once more, is a `ChildDied` in the result. `CannotWork` is raised with the reason if
    `make` fails, now or in a later child. `memory_gb` limits the child's own memory; `cpu_s` is the CPU time of all
    children. Several threads may call at once: the child works on up to `calls` batches at a time, each in a thread.
    """

    def __init__(
        self,
        make: Callable[[], Worker],
        memory_gb: float | None = None,
        timeout_s: float = _TIMEOUT_S,
        calls: int = 1,
    ) -> None:
        self._child: _Child | None = None
        self._make = cloudpickle.dumps(make)
        self._memory_bytes = int(memory_gb * 2**30) if memory_gb else resource.RLIM_INFINITY
        self._timeout_s = timeout_s
        self._calls = calls
        self._lock = threading.Lock()  # while a child starts, and while rows are retried alone
        self._ended_cpu_s = 0.0
        self._living()

    def __del__(self) -> None:
        if self._child:
            self._child.end()

    @property
    def cpu_s(self) -> float:
        return self._ended_cpu_s + (self._child.cpu_s if self._child else 0.0)

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        with self._lock:
            child = self._living()
        try:
            return child.ask(rows)
        except ChildDied:
            with self._lock:  # a row that kills takes no row of another batch with it
                return [self._alone(row) for row in rows]

    def _alone(self, row: Row) -> Row | Exception:
        died: ChildDied | None = None
        for _ in range(2):
            try:
                return self._living().ask([row])[0]
            except ChildDied as error:
                died = error
                if error.hung:  # the row has cost two timeouts by now
                    break
        assert died is not None
        return died

    def _living(self) -> "_Child":
        if self._child and self._child.died:
            self._ended_cpu_s += self._child.cpu_s
            self._child = None
        self._child = self._child or self._started()
        return self._child

    def _started(self) -> "_Child":
        """Start a child that can work; retry if it dies at once, with its node or for lack of memory."""
        for tries_left in (2, 1, 0):
            try:
                return _Child(self._make, self._memory_bytes, self._timeout_s, self._calls)
            except Exception as error:
                if not tries_left or not isinstance(error, (ChildDied, OSError)):
                    raise cannot_work(error) from error
        raise AssertionError


class _Child:
    """The process: numbered requests, and the thread that takes the answers. `died` is the reason of its end."""

    def __init__(self, make: bytes, memory_bytes: int, timeout_s: float, calls: int) -> None:
        self._timeout_s = timeout_s
        self.died: ChildDied | None = None
        self.cpu_s = 0.0
        self._sending, self._lock = threading.Lock(), threading.Lock()  # the latter guards `died` and `_waiting`
        self._numbers = count()
        self._waiting: dict[int, Future[Any]] = {}
        self._connection, theirs = Pipe()
        code = "from speechdistill.engine.isolate import child; child()"
        command = [sys.executable, "-P", "-c", code, *map(str, (theirs.fileno(), memory_bytes, calls))]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(import_path.without_current_folder(sys.path))}
        with theirs:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, pass_fds=[theirs.fileno()], env=environment
            )
        threading.Thread(target=self._take, daemon=True, name="answers").start()
        self._ask(make)

    def end(self) -> None:
        self._process.kill()

    def ask(self, rows: list[Row]) -> list[Row | Exception]:
        """Return the child's answer; raises `ChildDied`, or the error that the child raised."""
        answer: list[Row | Exception] = self._ask(rows)
        return answer

    def _ask(self, question: Any) -> Any:
        waiting: Future[Any] = Future()
        with self._lock:
            if self.died:
                raise self.died
            number = next(self._numbers)
            self._waiting[number] = waiting
        with self._sending, suppress(OSError):  # `_take` reports the end of the child
            self._connection.send((number, question))
        try:
            answer = waiting.result(self._timeout_s)
        except TimeoutError:
            self._ended(f"gave no answer for {self._timeout_s:.0f} s", hung=True)
            answer = waiting.result()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _take(self) -> None:
        with suppress(EOFError, OSError):
            while True:
                number, answer, self.cpu_s = self._connection.recv()
                with self._lock:
                    if number in self._waiting:
                        self._waiting.pop(number).set_result(answer)
        code = self._process.wait()
        self._connection.close()
        assert self._process.stdin
        self._process.stdin.close()
        self._ended(f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}")

    def _ended(self, how: str, hung: bool = False) -> None:
        """Answer all waiting calls with the reason; the first one is kept."""
        with self._lock:
            if self.died:
                return
            fix = "listen to its source file, or leave the file out"
            self.died = ChildDied(f"the process working on this row {how}", fix)
            self.died.hung = hung
            self._process.kill()
            waiting, self._waiting = self._waiting, {}
        for one in waiting.values():
            one.set_result(self.died)


def child() -> None:
    """Run the child's main loop. Arguments: descriptor of the connection, memory limit in bytes, batches at once."""
    connection = Connection(int(sys.argv[1]))
    memory_bytes, calls = map(int, sys.argv[2:])
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    threads, sending = ThreadPoolExecutor(calls), threading.Lock()

    def answer(number: int, what: Any) -> None:
        with sending:
            connection.send((number, what, time.process_time()))

    def work_on(number: int, rows: list[Row]) -> None:
        try:
            answer(number, [_portable(r) if isinstance(r, Exception) else r for r in work(rows)])
        except Exception as error:
            answer(number, _portable(error))

    number, make = connection.recv()
    try:
        work: Worker = threads.submit(lambda: pickle.loads(make)()).result()
    except Exception as error:
        error.add_note(f"In the child process:\n{traceback.format_exc()}")
        answer(number, _portable(error))
        os._exit(1)  # a normal exit would wait for the thread that holds stdin
    answer(number, None)
    while True:
        try:
            threads.submit(work_on, *connection.recv())
        except EOFError:
            os._exit(0)


def _end_with_stdin() -> None:
    os.read(0, 1)
    os._exit(0)


def _portable(error: Exception) -> Exception:
    """Return the error if pickling preserves it, else its text: an answer must always arrive."""
    try:
        pickle.loads(pickle.dumps(error))
        return error
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
