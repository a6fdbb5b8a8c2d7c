"""The engine on Ray Data: ids -> actor stages -> committed shards (`shards.py` is the commit protocol).

Every stage is one row in, one row out; an error is a status of its row, never a lost one. What a stage does not
catch (a dead actor, a dead node) Ray retries for ever, which is safe because a part's content is a function of
the run and its number.
"""

import json
import logging
import os
import secrets
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from tqdm import tqdm

from speechdistill import shards
from speechdistill.isolate import CannotStart, Isolated, Row, Worker
from speechdistill.shards import REJECT, Layout, RunError, Totals

_WRITE_CPUS = 0.25
_EARLY_ROWS = 100  # the reject share is judged against at least so many rows, or all of a smaller run


@dataclass(frozen=True)
class Stage:
    """A pool of actors that do `make()`'s work: rows in; per row the columns `adds`, or an exception, out.

    `num_cpus` and `num_gpus` are Ray's, per actor, and may be fractions. `isolated` runs the work in a child
    process of the actor, with at most `memory_gb`, for code that may crash.
    """

    name: str
    make: Callable[[], Worker]
    adds: pa.Schema
    actors: int = 1
    num_cpus: float = 0.25
    num_gpus: float = 0.0
    batch_rows: int = 8
    isolated: bool = False
    memory_gb: float | None = None


@dataclass(frozen=True)
class Flow:
    """What to run. `identity` decides what each id becomes and is kept in `run.json`; the rest only says how.

    `stages` makes the pools for a cluster's CPUs and GPUs; `on_part` sees the footer of each committed part.
    """

    layout: Layout
    identity: Mapping[str, Any]
    stages: Callable[[float, float], tuple[Stage, ...]]
    max_reject_share: float = 0.05
    retry_rejected: bool = False
    on_part: Callable[[Mapping[str, Any]], None] = lambda part: None


def connect() -> None:
    """Join the cluster of `RAY_ADDRESS` (a submitted job has it), or start a local Ray for this process."""
    # Read when ray.data is first imported; warnings tell of its own bars, ours are `tqdm`'s.
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    if ray.is_initialized():
        return
    package = Path(__file__).parent
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env={"py_modules": [str(package)]})
        return
    # A local Ray's workers inherit this environment. It listens on the network, so it wants a token (Ray's default):
    # in a variable, since the file it would make in the home folder would be picked up by later clusters.
    paths = [str(package.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    cpus = max(2, os.cpu_count() or 2)  # one logical CPU is for Ray Data's own tasks, one for the actors
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        logging_level=logging.ERROR,
    )


def run(flow: Flow) -> Totals:
    """Make every missing part, and return the totals over all of them, earlier ones included.

    Raises `RunError` where the folder belongs to another configuration, the cluster is too small for the pools,
    or more than `max_reject_share` of the rows are rejected. What is committed stays; the same call resumes.
    """
    layout = flow.layout
    shards.claim(layout.out, flow.identity)
    missing, totals = shards.survey(layout, flow.retry_rejected)
    _judge(flow, totals)
    if missing:
        shards.reopen(layout)
        connect()
        _stop_on_sigterm()
        resources = ray.cluster_resources()
        cpus, gpus = resources.get("CPU", 0.0), resources.get("GPU", 0.0)
        stages = flow.stages(cpus, gpus)
        check_pools(stages, cpus, gpus)
        with tqdm(total=layout.num_ids, initial=totals.done, unit="sample", dynamic_ncols=True) as bar:
            for part in _parts(layout, stages, np.array(missing, np.int64)):
                totals.add(part)
                bar.set_postfix(rejected=totals.rejected, refresh=False)
                bar.update(part["ids"])
                flow.on_part(part)
                _judge(flow, totals)
    shards.finish(layout)
    return totals


def _stop_on_sigterm() -> None:
    """Let SIGTERM, which `ray job stop` sends, end the driver as Ctrl-C does; the handler of `ray.init` aborts."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, stop)


def check_pools(stages: tuple[Stage, ...], cpus: float, gpus: float) -> None:
    """Raise `RunError` for pools that would wait for ever: Ray Data's own tasks need one CPU beside the actors."""
    wanted_cpus = sum(stage.actors * stage.num_cpus for stage in stages)
    wanted_gpus = sum(stage.actors * stage.num_gpus for stage in stages)
    pools = ", ".join(f"{s.name} {s.actors} × {s.num_cpus:g} CPU + {s.num_gpus:g} GPU" for s in stages)
    if any(stage.actors < 1 or stage.num_cpus <= 0 or stage.num_gpus < 0 for stage in stages):
        raise RunError(f"every pool needs at least one actor and a share of a CPU; these have {pools}")
    if wanted_cpus > cpus - 1 + 1e-6:
        raise RunError(
            f"the actor pools ({pools}) want {wanted_cpus:g} CPUs, but only {cpus - 1:g} of the cluster's {cpus:g} "
            "are free for actors (one is for reading and writing); lower the numbers of actors or their CPUs"
        )
    if wanted_gpus > gpus + 1e-6:
        raise RunError(
            f"the actor pools ({pools}) want {wanted_gpus:g} GPUs, but the cluster has {gpus:g}; "
            "lower the number of actors, or give each a fraction of a GPU"
        )


def _judge(flow: Flow, totals: Totals) -> None:
    judged = max(totals.done, min(flow.layout.num_ids, _EARLY_ROWS))
    if totals.rejected <= flow.max_reject_share * judged:
        return
    raise RunError(
        f"{totals.rejected} of {totals.done} samples were rejected, more than --max-reject-share "
        f"{flow.max_reject_share:g} allows; what was labelled is kept. {_reasons(flow)}"
        "Mend the cause and run the same command with --retry-rejected, or accept it with a higher share"
    )


def _reasons(flow: Flow) -> str:
    shards.finish(flow.layout, complete=False)
    reasons = shards.reject_reasons(flow.layout.out)
    lines = "".join(f"\n  {count} × {reason}" for reason, count in reasons.most_common(5))
    return f"The reasons (all are in {flow.layout.out}/rejects/rejects.parquet):{lines}\n"


def _parts(layout: Layout, stages: tuple[Stage, ...], missing: np.ndarray) -> Iterator[dict[str, Any]]:
    """Run the stages over the missing parts; yields the footer of each part once it is committed."""
    # One block per part, never split: then a stage's output is whole parts, whatever the order they arrive in. (A
    # repartition before the write, the obvious way, holds all parts back until the stages before it are done.)
    dataset = ray.data.range(len(missing), override_num_blocks=len(missing))
    dataset.context.target_max_block_size = None
    dataset.context.enable_progress_bars = False
    dataset = dataset.map_batches(
        partial(_expand, missing=missing, layout=layout), batch_size=None, batch_format="pyarrow"
    )
    columns = [pa.field("id", pa.int64())]
    for stage in stages:
        columns += list(stage.adds)
        dataset = dataset.map_batches(
            _Actor,
            fn_constructor_args=(stage, pa.schema([*columns, *REJECT])),
            batch_size=stage.batch_rows,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=stage.actors),
            num_cpus=stage.num_cpus,
            num_gpus=stage.num_gpus,
        )
    dataset = dataset.map_batches(
        partial(shards.write_parts, layout=layout), batch_size=None, batch_format="pyarrow", num_cpus=_WRITE_CPUS
    )
    try:
        for row in dataset.iter_rows():
            yield json.loads(row["part"])
    except ray.exceptions.RayError as error:
        *_, last = filter(None, map(str.strip, str(error).splitlines()))
        raise RunError(f"the run ended early: {last}; what is committed stays, the same command goes on") from error


def _expand(parts: pa.Table, missing: np.ndarray, layout: Layout) -> pa.Table:
    ids = np.concatenate([layout.ids(k) for k in missing[parts["id"].to_numpy()]])
    nulls = [pa.nulls(len(ids), field.type) for field in REJECT]
    return pa.Table.from_arrays([pa.array(ids, pa.int64()), *nulls], names=["id", *REJECT.names])


class _Actor:
    """One actor of a stage. A failing row becomes a reject; a batch that fails as a whole is tried row by row."""

    def __init__(self, stage: Stage, schema: pa.Schema) -> None:
        self._stage, self._schema = stage, schema
        self._work: Worker = Isolated(stage.make, stage.memory_gb) if stage.isolated else stage.make()

    def __call__(self, batch: pa.Table) -> pa.Table:
        rows = batch.to_pylist()
        live = [row for row in rows if row["reject_stage"] is None]
        for row, result in zip(live, self._results(live), strict=True):
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
        except CannotStart:  # ends the run: every row would fail
            raise
        except Exception as error:
            return [error] if len(rows) == 1 else [self._results([row])[0] for row in rows]
