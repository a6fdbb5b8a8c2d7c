"""The engine on Ray Data: ids -> actor stages -> committed shards (`shards.py` is the commit protocol).

Every stage is one row in, one row out; an error is a status of its row, never a lost one. What a stage does not
catch (a dead actor, a dead node) Ray retries for ever, which is safe because a part's content is a function of
the run and its number.
"""

import logging
import re
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from tqdm import tqdm

from speechdistill.engine import cluster, limits, shards
from speechdistill.engine.footers import Footers, Part
from speechdistill.engine.isolate import CannotWork, CannotWorkByFault, Isolated, Row, Worker
from speechdistill.engine.limits import Limits
from speechdistill.engine.monitor import Board, Monitor, Report, Work
from speechdistill.engine.pools import Pool
from speechdistill.engine.shards import REJECT, Layout, Totals
from speechdistill.engine.watch import Watch, stop_on_sigterm
from speechdistill.io import fingerprint
from speechdistill.io.errors import RunError

_LOG = logging.getLogger(__name__)
# Little of a CPU is needed to make ids and to write, and on a cluster whose pools are full no node may have more left.
_IO_CPUS = 0.01
_TRIAL_ROWS = 8
_AT_ONCE = 20_000  # parts in one execution of Ray Data, whose driver keeps an object for each


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A pool of actors that do `make()`'s work: rows in; per row the columns `adds`, or an exception, out.

    `isolated` runs the work in a child process of the actor, with at most `memory_gb`, for code that may crash.
    `calls`: batches that an actor works on at once, each in a thread, for work that waits for a GPU: the next ones are
    decoded meanwhile.
    """

    name: str
    make: Callable[[], Worker]
    adds: pa.Schema
    pool: Pool = Pool()
    batch_rows: int = 8
    isolated: bool = False
    memory_gb: float | None = None
    calls: int = 1


@dataclass(frozen=True, kw_only=True)
class Flow:
    """What to run. `identity` decides what each id becomes and is kept in `run.json`; the rest only says how.

    `stages` makes the pools for a cluster's CPUs and GPUs, which are at least `grow_to` (for a cluster that scales by
    itself). `on_part` sees the footer of each committed part, `report` the figures of `Monitor` once a minute. Rejects
    are a share of the run's ids and of `known` others, done elsewhere.
    """

    layout: Layout
    identity: Mapping[str, Any]
    stages: Callable[[float, float], tuple[Stage, ...]]
    limits: Limits = Limits()
    grow_to: tuple[float, float] = (0.0, 0.0)
    on_part: Callable[[Part], None] = lambda part: None
    report: Report = lambda figures: None
    report_every_s: float = 60.0
    stall_s: float = 1800.0  # longer than a few rows that hang their child take
    known: int = 0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What a sample of a run's ids cost: what each stage did, and the bytes of their parts."""

    num_ids: int
    labelled: int
    work: Mapping[str, Work]
    size_bytes: int
    stages: tuple[Stage, ...]


def run(flow: Flow) -> Totals:
    """Make every missing part, and return the totals over all of them, earlier ones included.

    After its `max_hours` it ends early: then the totals are not `complete`. Raises
    `RunError` where the folder belongs to another configuration or is not shared by all nodes, the cluster is too
    small for the pools, or more than `max_reject_share` of the rows are rejected. A fault of the program in a worker
    is Ray's error with its traceback. What is committed stays; the same call resumes.
    """
    flow = replace(flow, layout=replace(flow.layout, run=fingerprint.of(flow.identity)))
    layout = flow.layout
    shards.claim(layout.out, flow.identity)
    if others := shards.strangers(layout.out):
        text = "%s/shards has %d files that are not parts of this run (%s); they are ignored"
        _LOG.warning(text, layout.out, len(others), ", ".join(others[:3]))
    footers = Footers(layout.out)
    missing, totals = shards.survey(layout, flow.limits.rejects.retry_rejected, footers)
    limits.judge(flow.limits.rejects, layout, totals.rejected, totals.done, flow.known)
    if missing:
        shards.reopen(layout)
        stages = _pools(flow)
        cluster.check_shared(layout.out)
        with (
            tqdm(total=layout.num_ids, initial=totals.done, unit="sample", dynamic_ncols=True) as bar,
            Monitor(totals, layout.num_ids, [s.name for s in stages], flow.report, flow.report_every_s) as monitor,
            Watch(flow.limits.max_hours, flow.stall_s, monitor.still_s) as watch,
        ):
            left = dict.fromkeys(missing)
            while left and not watch.time_is_up:
                made = _parts(layout, stages, list(islice(left, _AT_ONCE)), monitor.renew())
                with closing(made) as parts, watch.ending_it():
                    for part in parts:
                        left.pop(part.number)
                        monitor.moved()
                        footers.note(part)
                        totals.add(part)
                        bar.set_postfix(rejected=totals.rejected, refresh=False)
                        bar.update(part.num_ids)
                        flow.on_part(part)
                        limits.judge(flow.limits.rejects, layout, totals.rejected, totals.done, flow.known)
                        if watch.time_is_up:
                            break
        if left or watch.interrupted:  # perhaps between a commit and its count
            _, totals = shards.survey(layout, footers=footers)
        totals.complete = not left
    shards.finish(layout, totals.complete, footers)
    return totals


def trial(flow: Flow, num_ids: int = 200) -> Trial:
    """Make `num_ids` ids, spread evenly over the run, write nothing, and tell what they cost."""
    layout = replace(flow.layout, rows_per_part=min(_TRIAL_ROWS, flow.layout.num_ids))
    whole_parts = layout.num_ids // layout.rows_per_part
    chosen = np.unique(np.linspace(0, whole_parts - 1, min(whole_parts, -(-num_ids // _TRIAL_ROWS))).astype(np.int64))
    stages, board = _pools(flow), Board()
    totals, size_bytes = Totals(), 0
    with tqdm(total=len(chosen) * layout.rows_per_part, unit="sample", dynamic_ncols=True, desc="dry run") as bar:
        for part in _parts(layout, stages, chosen.tolist(), board, publish=False):
            totals.add(part)
            size_bytes += part.size_bytes
            bar.update(part.num_ids)
    return Trial(
        num_ids=totals.done,
        labelled=totals.labelled,
        work=_noted(board, totals.done),
        size_bytes=size_bytes,
        stages=stages,
    )


def _noted(board: Board, rows: int) -> Mapping[str, Work]:
    """What the board knows once the last notes have arrived."""
    for _ in range(100):
        work = board.read()
        if work.get("write", Work()).rows >= rows:
            return work
        time.sleep(0.1)
    raise RunError("the workers did not tell what they have done", "try the dry run again")


def _pools(flow: Flow) -> tuple[Stage, ...]:
    cluster.connect()
    stop_on_sigterm()
    resources = ray.cluster_resources()
    cpus, gpus = (max(resources.get(name, 0.0), n) for name, n in zip(("CPU", "GPU"), flow.grow_to, strict=True))
    stages = flow.stages(cpus, gpus)
    check_pools(stages, cpus, gpus)
    now = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
    if now != (cpus, gpus):
        text = "the pools are sized for %g CPUs and %g GPUs; the cluster has %g and %g now, and must grow to them"
        _LOG.warning(text, cpus, gpus, *now)
    return stages


def check_pools(stages: tuple[Stage, ...], cpus: float, gpus: float) -> None:
    """Raise `RunError` for pools that would wait for ever: Ray Data's own tasks need one CPU beside the actors."""
    wanted_cpus = sum(stage.pool.actors * stage.pool.num_cpus for stage in stages)
    wanted_gpus = sum(stage.pool.actors * stage.pool.num_gpus for stage in stages)
    pools = ", ".join(f"{s.name} {s.pool.actors} × {s.pool.num_cpus:g} CPU + {s.pool.num_gpus:g} GPU" for s in stages)
    if any(stage.pool.actors < 1 or stage.pool.num_cpus <= 0 or stage.pool.num_gpus < 0 for stage in stages):
        raise RunError(
            f"a pool without an actor or a share of a CPU ({pools})", "give every pool at least one and a share"
        )
    if wanted_cpus > cpus - 1 + 1e-6:
        raise RunError(
            f"the actor pools ({pools}) want {wanted_cpus:g} CPUs, but only {cpus - 1:g} of the cluster's {cpus:g} "
            "are free for actors (one is for reading and writing)",
            "lower the numbers of actors or their CPUs, or say with --grow-to what the cluster may grow to",
        )
    if wanted_gpus > gpus + 1e-6:
        raise RunError(
            f"the actor pools ({pools}) want {wanted_gpus:g} GPUs, but the cluster has {gpus:g}",
            "lower the number of actors, give each a fraction of a GPU, or say with --grow-to what the cluster may "
            "grow to",
        )


def _parts(
    layout: Layout, stages: tuple[Stage, ...], missing: list[int], board: Board, publish: bool = True
) -> Generator[Part, None, None]:
    """Run the stages over the missing parts; yields the footer of each part once it is committed."""
    from speechdistill.engine.parts import Parts  # imports ray.data, which takes seconds

    # One block per part, never split: then a stage's output is whole parts, whatever the order they arrive in. (A
    # repartition before the write, the obvious way, holds all parts back until the stages before it are done.)
    dataset = ray.data.read_datasource(
        Parts(layout, missing),
        num_cpus=_IO_CPUS,
        concurrency=min(2, len(missing)),
        override_num_blocks=len(missing),
    )
    dataset.context.target_max_block_size = None
    dataset.context.enable_progress_bars = False
    # By default Ray Data gives up a run that waits half an hour for nodes; here `Watch` looks after that.
    dataset.context.execution_no_progress_timeout_s = -1
    # By default an actor that dies while it starts, with its node say, ends the run.
    dataset.context.max_consecutive_actor_init_deaths = 3 + 2 * max(stage.pool.actors for stage in stages)
    columns = [pa.field("id", pa.int64())]
    for stage in stages:
        columns += list(stage.adds)
        dataset = dataset.map_batches(
            _Actor,
            fn_constructor_args=(stage, pa.schema([*columns, *REJECT]), board),
            batch_size=stage.batch_rows,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(
                min_size=1,
                max_size=stage.pool.actors,
                max_concurrent_calls_per_actor=stage.calls,
                enable_true_multi_threading=stage.calls > 1,
            ),
            num_cpus=stage.pool.num_cpus,
            num_gpus=stage.pool.num_gpus,
        )
    write = partial(_write, layout=layout, board=board, publish=publish)
    writers = ray.data.TaskPoolStrategy(size=min(max(2, stages[-1].pool.actors // 4), len(missing)))
    dataset = dataset.map_batches(write, batch_size=None, batch_format="pyarrow", compute=writers, num_cpus=_IO_CPUS)
    try:
        for row in dataset.iter_rows():
            yield Part.from_json(row["part"])
    except ray.exceptions.RayError as error:
        if _is_fault(error):
            error.add_note("what is committed stays, the same command goes on")
            raise
        raise RunError(
            f"the run ended early: {_cause(error)}", "what is committed stays, the same command goes on"
        ) from error


def _is_fault(error: Exception) -> bool:
    """Whether a stage raised what no user can mend; its traceback is in the error's text."""
    raised = isinstance(error, ray.exceptions.RayTaskError) or getattr(error, "actor_init_failed", False)
    name = _cause(error).partition(":")[0]
    return raised and (name.partition(".")[0] != "speechdistill" or name.endswith(CannotWorkByFault.__name__))


def _cause(error: Exception) -> str:
    """What a worker raised, "module.Class: message": Ray Data puts an error with advice on its settings behind it."""
    blocks = str(error).split("\n\nThe above exception was the direct cause of the following exception:\n\n")
    block = next((block for block in reversed(blocks) if "exceptions.UserCodeException" not in block), blocks[-1])
    *_, raised = re.split(r'^ *File ".*\n(?: .*\n)*', block, flags=re.MULTILINE)  # behind the last frame
    return raised.strip()


def _write(block: pa.Table, layout: Layout, board: Board, publish: bool) -> pa.Table:
    cluster.be_patient()
    began, cpu_began = time.monotonic(), time.process_time()
    written = shards.write_parts(block, layout, publish)
    board.note("write", len(block), time.monotonic() - began, time.process_time() - cpu_began)
    return written


class _Actor:
    """One actor of a stage. A failing row becomes a reject; a batch that fails as a whole is tried row by row."""

    def __init__(self, stage: Stage, schema: pa.Schema, board: Board) -> None:
        self._stage, self._schema, self._board = stage, schema, board
        cluster.be_patient()
        cluster.node_use()  # the first answer is about no time at all
        isolated = partial(Isolated, stage.make, stage.memory_gb, calls=stage.calls)
        self._work: Worker = isolated() if stage.isolated else stage.make()
        self._lock, self._noted = threading.Lock(), (0.0, 0.0)

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        live = [row for row in rows if row["reject_stage"] is None]
        began = time.monotonic(), self._cpu_s()
        results = self._results(live)
        self._note(len(rows), *began)
        for row, result in zip(live, results, strict=True):
            if isinstance(result, Exception):
                reason = (self._stage.name, type(result).__name__, str(result))
                row.update(zip(REJECT.names, reason, strict=True))
            else:
                row.update(result)
        return pa.Table.from_pylist(rows, self._schema)

    def _results(self, rows: list[Row]) -> list[Row | Exception]:
        if not rows:
            return []
        try:
            return self._work(rows)
        except CannotWork:  # ends the run: every row would fail
            raise
        except Exception as error:
            return [error] if len(rows) == 1 else [self._results([row])[0] for row in rows]

    def _note(self, rows: int, began: float, cpu_began: float) -> None:
        """Tell the board; what batches do at the same time counts once."""
        with self._lock:
            now, cpu_s = time.monotonic(), self._cpu_s()
            since, cpu_since = (max(pair) for pair in zip(self._noted, (began, cpu_began), strict=True))
            self._board.note(self._stage.name, rows, now - since, cpu_s - cpu_since)
            self._noted = now, cpu_s
            self._board.note_use()

    def _cpu_s(self) -> float:
        return time.process_time() + getattr(self._work, "cpu_s", 0.0)
