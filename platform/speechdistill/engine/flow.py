"""The engine: run a flow of stages over the ids of a run (`pipeline.py`), and commit the parts (`shards.py`).

Each stage takes one row and returns one row. An error is a status of its row: no row is lost. Ray retries without limit
after failures that no stage catches, such as a dead actor or node. That is safe because the content of a part is a
function of the run and the part's number.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import ray
from tqdm import tqdm

from speechdistill.engine import cluster, limits, pipeline, shards
from speechdistill.engine.footers import Footers, Part
from speechdistill.engine.limits import Limits
from speechdistill.engine.monitor import Board, Monitor, Report, Work
from speechdistill.engine.shards import Layout, Totals
from speechdistill.engine.stages import Stage, check_pools
from speechdistill.engine.watch import Watch, stop_on_sigterm
from speechdistill.io import fingerprint
from speechdistill.io.errors import RunError

_LOG = logging.getLogger(__name__)
_TRIAL_ROWS = 8
_AT_ONCE = 20_000  # parts in one execution of Ray Data: the driver keeps an object for each


@dataclass(frozen=True, kw_only=True)
class Flow:
    """A run of the engine. `identity` determines the result of each id and is kept in `run.json`; other fields do not
    affect results.

    `stages` returns the stages for a cluster's CPUs and GPUs, at least `grow_to` for a cluster that scales by itself.
    `on_part` is called with each committed part, `report` with the figures of `Monitor` once a minute. The reject share
    is that of the run's ids and of `known` other rows, which were done elsewhere.
    """

    layout: Layout
    identity: Mapping[str, Any]
    stages: Callable[[float, float], tuple[Stage, ...]]
    limits: Limits = Limits()
    grow_to: tuple[float, float] = (0.0, 0.0)
    on_part: Callable[[Part], None] = lambda part: None
    report: Report = lambda figures: None
    report_every_s: float = 60.0
    stall_s: float = 1800.0  # longer than a few rows whose child process hangs
    known: int = 0


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The cost of a trial over some of a run's ids: the work of each stage, and the bytes of the parts."""

    num_ids: int
    labelled: int
    work: Mapping[str, Work]
    size_bytes: int
    stages: tuple[Stage, ...]


def run(flow: Flow) -> Totals:
    """Make every missing part and return the totals over all parts, earlier ones included.

    After `max_hours` the run ends early and the totals are not `complete`. Raises `RunError` if the folder belongs to
    another configuration or is not shared by all nodes, the cluster is too small for the pools, or more than
    `max_reject_share` of the rows are rejected. A fault of the program in a worker raises Ray's error with the
    traceback. Committed parts are kept, and the same call resumes.
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
        totals = _make(flow, missing, totals, footers)
    shards.finish(layout, totals.complete, footers)
    return totals


def _make(flow: Flow, missing: Sequence[int], totals: Totals, footers: Footers) -> Totals:
    """Make the missing parts until they are done or the time is up; return the totals over all parts."""
    layout = flow.layout
    stages = _pools(flow)
    cluster.check_shared(layout.out)
    with (
        tqdm(total=layout.num_ids, initial=totals.done, unit="sample", dynamic_ncols=True) as bar,
        Monitor(totals, layout.num_ids, [s.name for s in stages], flow.report, flow.report_every_s) as monitor,
        Watch(flow.limits.max_hours, flow.stall_s, monitor.still_s) as watch,
    ):
        left = dict.fromkeys(missing)
        while left and not watch.time_is_up:
            made = pipeline.parts(layout, stages, list(islice(left, _AT_ONCE)), monitor.renew())
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
    if left or watch.interrupted:  # perhaps stopped between a commit and its count
        _, totals = shards.survey(layout, footers=footers)
    totals.complete = not left
    return totals


def trial(flow: Flow, num_ids: int = 200) -> Trial:
    """Process `num_ids` ids, spread evenly over the run, and return their cost. Nothing is written."""
    layout = replace(flow.layout, rows_per_part=min(_TRIAL_ROWS, flow.layout.num_ids))
    whole_parts = layout.num_ids // layout.rows_per_part
    chosen = np.unique(np.linspace(0, whole_parts - 1, min(whole_parts, -(-num_ids // _TRIAL_ROWS))).astype(np.int64))
    stages, board = _pools(flow), Board()
    totals, size_bytes = Totals(), 0
    with tqdm(total=len(chosen) * layout.rows_per_part, unit="sample", dynamic_ncols=True, desc="dry run") as bar:
        for part in pipeline.parts(layout, stages, chosen.tolist(), board, publish=False):
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
    """Wait for the last notes on the board and return the work of each stage; raises `RunError` after 10 s."""
    for _ in range(100):
        work = board.read()
        if work.get("write", Work()).rows >= rows:
            return work
        time.sleep(0.1)
    raise RunError("the workers did not report their work", "rerun the dry run")


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
