"""Ray Data under a flow: ids -> actor stages -> committed parts."""

import re
import time
from collections.abc import Generator
from functools import partial

import pyarrow as pa
import ray

from speechdistill.engine import cluster, shards
from speechdistill.engine.actor import Actor
from speechdistill.engine.footers import Part
from speechdistill.engine.isolate import CannotWorkByFault
from speechdistill.engine.monitor import Board
from speechdistill.engine.shards import REJECT, Layout
from speechdistill.engine.stages import Stage
from speechdistill.io.errors import RunError

# Making ids and writing take little CPU, and on a cluster with full pools no node may have more left.
_IO_CPUS = 0.01


def parts(
    layout: Layout, stages: tuple[Stage, ...], missing: list[int], board: Board, publish: bool = True
) -> Generator[Part, None, None]:
    """Run the stages over the missing parts; yields each part once it is committed.

    Raises `RunError` if a worker cannot work, and Ray's error for a fault of the program.
    """
    from speechdistill.engine.parts import Parts  # imports ray.data, which takes seconds

    # One block per part, never split: a stage then puts out whole parts, in any order. (A repartition before the
    # write, the obvious way, holds all parts back until the earlier stages are done.)
    dataset = ray.data.read_datasource(
        Parts(layout, missing),
        num_cpus=_IO_CPUS,
        concurrency=min(2, len(missing)),
        override_num_blocks=len(missing),
    )
    dataset.context.target_max_block_size = None
    dataset.context.enable_progress_bars = False
    # By default Ray Data gives up after waiting half an hour for nodes; `Watch` handles that here.
    dataset.context.execution_no_progress_timeout_s = -1
    # By default an actor that dies during its start, perhaps with its node, ends the run.
    dataset.context.max_consecutive_actor_init_deaths = 3 + 2 * max(stage.pool.actors for stage in stages)
    columns = [pa.field("id", pa.int64())]
    for stage in stages:
        columns += list(stage.adds)
        dataset = dataset.map_batches(
            Actor,
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
            error.add_note("committed parts are kept; fix the cause and rerun the command")
            raise
        raise RunError(
            f"the run ended early: {_cause(error)}", "committed parts are kept; fix the cause and rerun the command"
        ) from error


def _is_fault(error: Exception) -> bool:
    """Whether a stage raised an error that no user can fix. The error's text has the traceback."""
    raised = isinstance(error, ray.exceptions.RayTaskError) or getattr(error, "actor_init_failed", False)
    name = _cause(error).partition(":")[0]
    return raised and (name.partition(".")[0] != "speechdistill" or name.endswith(CannotWorkByFault.__name__))


def _cause(error: Exception) -> str:
    """Return the error of a worker, "module.Class: message". Ray Data appends an error with advice on its settings."""
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
