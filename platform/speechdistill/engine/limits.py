"""Limits after which a run on the engine stops: its share of rejects, its time."""

from dataclasses import dataclass

from speechdistill.engine import shards
from speechdistill.engine.shards import Layout
from speechdistill.io.errors import RunError
from speechdistill.io.options import at_least

_EARLY_ROWS = 100  # the reject share is taken over at least so many rows, or all of a smaller run


@dataclass(frozen=True, kw_only=True)
class Rejects:
    """The share of input that may be unusable."""

    max_reject_share: float = 0.05
    """Stop when more than this share of the samples had to be rejected."""
    retry_rejected: bool = False
    """Make the parts with rejects again, after their cause was fixed."""

    def __post_init__(self) -> None:
        at_least(self, max_reject_share=0)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Conditions under which a run stops early."""

    rejects: Rejects = Rejects()
    max_hours: float | None = None
    """Stop cleanly after so many hours; the same command resumes later."""

    def __post_init__(self) -> None:
        at_least(self, max_hours=0)


def judge(limits: Rejects, layout: Layout, rejected: int, done: int, known: int = 0) -> None:
    """Raise `RunError` with the reasons if too many of the `done` rows, and of `known` others, were rejected."""
    done += known
    judged = max(done, min(known + layout.num_ids, _EARLY_ROWS))
    if rejected <= limits.max_reject_share * judged:
        return
    again = "" if limits.retry_rejected else " with --retry-rejected"
    raise RunError(
        f"{rejected} of {done} samples were rejected, more than --max-reject-share "
        f"{limits.max_reject_share:g} allows; labelled samples are kept. {_reasons(layout)}",
        f"Fix the cause and rerun the command{again}, or accept it with a higher share",
    )


def _reasons(layout: Layout) -> str:
    shards.finish(layout, complete=False)
    reasons = shards.reject_reasons(layout.out)
    lines = "".join(f"\n  {count} × {reason}" for reason, count in reasons.most_common(5))
    return f"The reasons (all are in {layout.out}/rejects/rejects.parquet):{lines}\n"
