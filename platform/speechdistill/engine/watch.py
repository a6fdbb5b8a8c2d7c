"""Looking after a run from its main thread: a time limit, pools that stand still, a signal to stop."""

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

_LOG = logging.getLogger(__name__)


def stop_on_sigterm() -> None:
    """Let SIGTERM, which `ray job stop` sends, end the driver as Ctrl-C does; the handler of `ray.init` aborts."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


class _Enough(BaseException):  # no Exception: what lies between must not take it for a failure of its own
    pass


class Watch:
    """Looks every ten seconds whether the time is up or nothing moves any more (in the main thread, as signals are).

    Nothing moves where a node is gone and does not come back: teachers that wait for its audio may hold the CPUs that
    the actors which make it again need. Starting the pools anew frees them.
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
        """The body may be ended anywhere; what it had begun is begun again."""
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
            _LOG.warning("nothing was made for %.0f s: the pools are started anew", still_s)
            self._stall_s *= 2  # in case it only takes so long
        self.interrupted = True
        raise _Enough  # one that lands in a destructor is dropped; the next look raises it again
