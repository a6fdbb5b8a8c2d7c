"""Monitoring of a run: the work of its actors, and its progress once a minute."""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from speechdistill.engine import cluster
from speechdistill.engine.shards import Totals

_LOG = logging.getLogger(__name__)
_USE_EVERY_S = 30.0

Report = Callable[[Mapping[str, float]], None]


@dataclass
class Work:
    """Work of one stage's actors. Rows that Ray made again, after a kill, are counted again."""

    rows: int = 0
    busy_s: float = 0.0
    cpu_s: float = 0.0


@dataclass(frozen=True, kw_only=True)
class _Snapshot:
    """Progress at a time: rows done, the additive numbers of the totals, and the work of each stage."""

    time_s: float
    done: int
    sums: Mapping[str, float]
    work: Mapping[str, Work]


class _Board:
    def __init__(self) -> None:
        self._work: dict[str, Work] = {}
        self._uses: dict[str, tuple[float, cluster.Use]] = {}

    def add(self, stage: str, rows: int, busy_s: float, cpu_s: float) -> None:
        work = self._work.setdefault(stage, Work())
        work.rows, work.busy_s, work.cpu_s = work.rows + rows, work.busy_s + busy_s, work.cpu_s + cpu_s

    def note_use(self, node: str, use: cluster.Use) -> None:
        self._uses[node] = time.monotonic(), use

    def read(self) -> dict[str, Work]:
        return self._work

    def uses(self) -> list[cluster.Use]:
        return [use for at, use in self._uses.values() if time.monotonic() - at < 3 * _USE_EVERY_S]


class Board:
    """Board on which the workers of a run, on any node, note their work. A lost note only makes the figures smaller."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._actor = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)(_Board).remote()
        self._next_use = 0.0
        self._last: dict[str, Work] = {}

    def note(self, stage: str, rows: int, busy_s: float, cpu_s: float) -> None:
        """Note the rows that a worker made, the time and the CPU time."""
        self._actor.add.remote(stage, rows, busy_s, cpu_s)

    def note_use(self) -> None:
        """Note the use of this node's CPUs and GPUs, at most twice a minute, called by actors.

        (A task on each node would count as work and keep idle nodes alive.)
        """
        if time.monotonic() > self._next_use:
            self._next_use = time.monotonic() + _USE_EVERY_S
            self._actor.note_use.remote(ray.get_runtime_context().get_node_id(), cluster.node_use())

    def read(self) -> dict[str, Work]:
        """Return the work of each stage; the last answer if the board does not answer."""
        with suppress(ray.exceptions.RayError):
            self._last = dict(ray.get(self._actor.read.remote(), timeout=10))
        return self._last

    def uses(self) -> list[cluster.Use]:
        """Return the use of each node that was at work within 90 s."""
        try:
            return list(ray.get(self._actor.uses.remote(), timeout=10))
        except ray.exceptions.RayError:
            return []


class Monitor:
    """Call `report` every `every_s` seconds and at the end, in a thread of its own, with these figures:

    `done`, `labelled`, `rejected` and `rejected/<stage>.<error type>`; since the last report `samples_per_s` and
    `per_s/<sum>` for every number in the totals' sums; `eta_s`; `queue/<stage>`, the rows that wait for a stage;
    `busy/<stage>`, the mean number of its actors at work; `nodes`, `cpu_use` and `gpu_use` (0 to 1).
    """

    def __init__(self, totals: Totals, num_ids: int, stages: Sequence[str], report: Report, every_s: float) -> None:
        self.board = Board()
        self._totals, self._num_ids, self._stages = totals, num_ids, [*stages, "write"]
        self._report, self._every_s = report, every_s
        self._before = self._began = self._now()
        self._moved_at = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="monitor")

    def __enter__(self) -> "Monitor":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(timeout=30)

    def renew(self) -> Board:
        """Return a board for restarted pools. Unfinished work of the old pools is made again."""
        self.board, self._before = Board(), replace(self._before, work={})
        self.moved()
        return self.board

    def moved(self) -> None:
        """Restart the clock of `still_s`."""
        self._moved_at = time.monotonic()

    def still_s(self) -> float:
        """Return the seconds since a worker last finished rows, as far as is known."""
        return time.monotonic() - self._moved_at

    def _loop(self) -> None:
        ended = False
        while not ended:
            ended = self._end.wait(self._every_s)
            try:
                self._look()
            except Exception as error:  # a passing error of the cluster: without this thread a run looks stalled
                _LOG.warning("no figures this time (%s: %s)", type(error).__name__, error)

    def _look(self) -> None:
        now = self._now()
        if now.work != self._before.work or now.done != self._before.done:
            self.moved()
        self._report({**self._progress(now), **self._at_work(now), **cluster.use(self.board.uses())})
        self._before = now

    def _now(self) -> _Snapshot:
        sums = {key: value for key, value in dict(self._totals.sums).items() if isinstance(value, float)}
        return _Snapshot(time_s=time.monotonic(), done=self._totals.done, sums=sums, work=self.board.read())

    def _progress(self, now: _Snapshot) -> dict[str, float]:
        totals, before, began = self._totals, self._before, self._began
        seconds = now.time_s - before.time_s
        rate = (now.done - began.done) / (now.time_s - began.time_s)
        return {
            "done": now.done,
            "labelled": totals.labelled,
            "rejected": totals.rejected,
            **{f"rejected/{reason}": count for reason, count in dict(totals.reasons).items()},
            "samples_per_s": (now.done - before.done) / seconds,
            **{f"per_s/{key}": (value - before.sums.get(key, 0)) / seconds for key, value in now.sums.items()},
            **({"eta_s": (self._num_ids - now.done) / rate} if rate else {}),
        }

    def _at_work(self, now: _Snapshot) -> dict[str, float]:
        work, before = now.work, self._before.work
        seconds = now.time_s - self._before.time_s
        rows = [work.get(stage, Work()).rows for stage in self._stages]
        queues = zip(self._stages[1:], rows[:-1], rows[1:], strict=True)
        busy = (
            (stage, work[stage].busy_s - before.get(stage, Work()).busy_s) for stage in self._stages if stage in work
        )
        return {
            **{f"queue/{stage}": max(0, handed - done) for stage, handed, done in queues},
            **{f"busy/{stage}": max(0.0, busy_s / seconds) for stage, busy_s in busy},
        }
