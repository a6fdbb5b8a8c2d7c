"""Watch over a run from the main thread: its time limit, stalled pools, SIGTERM."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_LOG = logging.getLogger(__name__)


def stop_on_sigterm() -> None:
    """Make SIGTERM, which `ray job stop` sends, end the driver as Ctrl-C does. The handler of `ray.init` aborts."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


class _Enough(BaseException):
    """Raised in the main thread to end an iteration of Ray Data.

    Derives from BaseException so that `except Exception` blocks in between do not swallow it.
    """


class Watch:
    """Check every ten seconds whether the time is up or the pools have stalled.

    Pools stall if a node is lost for good: teachers that wait for its audio may hold the CPUs that actors need to make
    the audio again. New pools free them.

    The check is a signal handler in the main thread, since Ray Data has no public way to stop an execution from another
    thread. A generator that runs in one thread cannot be closed in another (`ValueError`), and the actors of an
    execution that is not stopped keep the CPUs that the new pools need.
    """

    _EVERY_S = 10.0

    def __init__(self, max_hours: float | None, stall_s: float, still_s: Callable[[], float]) -> None:
        self._end = time.monotonic() + 3600 * (float("inf") if max_hours is None else max_hours)
        self._stall_s, self._still_s = stall_s, still_s
        self._armed = self.interrupted = False

    @property
    def time_is_up(self) -> bool:
        return time.monotonic() >= self._end

    def __enter__(self) -> "Watch":
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGALRM, self._look)
            first_s = min(max(1e-3, self._end - time.monotonic()), self._EVERY_S)
            signal.setitimer(signal.ITIMER_REAL, first_s, min(self._EVERY_S, self._stall_s))
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    @contextmanager
    def ending_it(self) -> Iterator[None]:
        """Allow the check to end the body at any point. Unfinished work is made again."""
        with suppress(_Enough):
            self._armed = True
            try:
                yield
            finally:
                self._armed = False

    def _look(self, *_: object) -> None:
        time_is_up, still_s = self.time_is_up, self._still_s()
        if not self._armed or not (time_is_up or still_s > self._stall_s):
            return
        if not time_is_up:
            _LOG.warning("nothing was made for %.0f s: the pools are restarted", still_s)
            self._stall_s *= 2  # the work may just be slow
        self.interrupted = True
        raise _Enough  # Python drops an exception raised in a destructor; the next check raises it again
