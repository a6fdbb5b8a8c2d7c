"""The share of a cluster that a training run takes, and amounts of CPUs and GPUs as options state them."""

from dataclasses import dataclass

from speechdistill.io.options import OptionError, at_least

_UNITS = ("cpu", "gpu")


def amounts(option: str, text: str | None) -> dict[str, float]:
    """Parse `cpu=0.05,gpu=2.5`; raises `OptionError` naming the option and the form."""
    values: dict[str, float] = {}
    for item in text.split(",") if text is not None else ():
        name, _, number = item.partition("=")
        unit = name.strip().lower()
        try:
            amount = float(number)
        except ValueError:
            amount = -1.0
        if unit not in _UNITS or unit in values or not 0 <= amount < float("inf"):
            raise OptionError(
                f"Invalid {option}: {text!r}", "use non-negative amounts such as cpu=2,gpu=0.5, each unit once"
            )
        values[unit] = amount
    return values


def grown(grow_to: str | None) -> tuple[float, float]:
    """Return the CPUs and GPUs that a cluster may grow to; 0 for a unit that --grow-to does not name."""
    later = amounts("--grow-to", grow_to)
    return later.get("cpu", 0.0), later.get("gpu", 0.0)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Workers of each training run, and their share of the cluster."""

    workers: str = "1"
    """Workers of each run: a number, or FEWEST:MOST for a run that grows and shrinks with the cluster."""
    cpus_per_worker: float = 1.0
    """CPUs, and threads, of each worker."""
    gpus_per_worker: float | None = None
    """GPUs of each worker; 0.5, 0.25 or 0.125 for several runs on one. Default: 1 if the cluster has one, else 0."""
    grow_to: str | None = None
    """Size that a cluster with autoscaling may grow to, such as cpu=320,gpu=8. Default: the nodes it has now."""

    def __post_init__(self) -> None:
        grown(self.grow_to)
        at_least(self, gpus_per_worker=0)
        if not self.cpus_per_worker > 0:
            raise OptionError(f"--cpus-per-worker is {self.cpus_per_worker:g}", "it must be above 0")
        fewest, most = self.range
        if not 1 <= fewest <= most:
            raise OptionError(f"--workers is {self.workers!r}", "give a number from 1, or FEWEST:MOST such as 1:8")

    @property
    def range(self) -> tuple[int, int]:
        """The fewest and the most workers of a run."""
        fewest, _, most = self.workers.partition(":")
        try:
            return int(fewest), int(most or fewest)
        except ValueError:
            return 0, 0
