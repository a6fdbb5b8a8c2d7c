"""Send MLflow the events that it lacks of tracked runs."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from speechdistill.commands.guarded import guarded
from speechdistill.tracking.run import sync


@dataclass(frozen=True, kw_only=True)
class Sync:
    """Send MLflow the events that it lacks of runs that were tracked while its server did not answer.

    Exit code 1 while some events are left, for example those of a job that still runs.
    """

    outs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Output folders of runs, local paths or URLs."""


@guarded("events sent so far stay in MLflow; the same command sends the rest")
def command(config: Annotated[Sync, tyro.conf.arg(name="")]) -> int:
    left = 0
    for out in config.outs:
        result = sync(out)
        print(f"{out}: {result.sent:,} events sent, {result.left:,} left; MLflow run {result.run_id}")
        left += result.left
    return 1 if left or not config.outs else 0
