"""What a run will take: hours of CPU and GPU, bytes, money, from a trial of a few hundred of its samples."""

from collections.abc import Mapping
from dataclasses import dataclass

from speechdistill.engine.flow import Trial
from speechdistill.engine.monitor import Work
from speechdistill.io.errors import RunError

_UNITS = ("cpu", "gpu")


def amounts(option: str, text: str | None) -> dict[str, float]:
    """`cpu=0.05,gpu=2.5` as a dictionary of what it names; raises `RunError` naming the option and the form."""
    values: dict[str, float] = {}
    for item in text.split(",") if text is not None else ():
        name, _, number = item.partition("=")
        unit = name.strip().lower()
        try:
            amount = float(number)
        except ValueError:
            amount = -1.0
        if unit not in _UNITS or unit in values or not 0 <= amount < float("inf"):
            raise RunError(
                f"Invalid {option}: {text!r}", "use non-negative amounts such as cpu=2,gpu=0.5, each unit once"
            )
        values[unit] = amount
    return values


@dataclass(frozen=True)
class Estimate:
    """What `num_samples` take, start-up apart. `hours` is the time on the pools that the trial had; `money` is None
    where something that costs hours has no price."""

    num_samples: int
    trial_samples: int
    trial_rejected: int
    cpu_hours: float
    gpu_hours: float
    output_gb: float
    hours: float
    money: float | None


def estimate(trial: Trial, num_samples: int, price: Mapping[str, float]) -> Estimate:
    """The trial's cost per sample, times `num_samples`; a GPU is paid for while its actors work."""
    scale = num_samples / max(1, trial.num_ids) / 3600
    work = {stage.name: (stage, trial.work.get(stage.name, Work())) for stage in trial.stages}
    cpu_hours = sum(done.cpu_s for done in trial.work.values()) * scale
    gpu_hours = sum(done.busy_s * stage.num_gpus for stage, done in work.values()) * scale
    spent = {"cpu": cpu_hours, "gpu": gpu_hours}
    known = all(unit in price for unit in _UNITS if spent[unit])
    # The slowest pool sets the pace.
    hours = max(done.busy_s / stage.actors for stage, done in work.values()) * scale
    return Estimate(
        num_samples,
        trial.num_ids,
        trial.num_ids - trial.labelled,
        cpu_hours,
        gpu_hours,
        trial.size_bytes / max(1, trial.num_ids) * num_samples / 1e9,
        hours,
        sum(amount * spent[unit] for unit, amount in price.items()) if known else None,
    )
