"""The cost of a run, in CPU and GPU hours, bytes and money, from a trial of a few hundred samples."""

from collections.abc import Mapping
from dataclasses import dataclass

from speechdistill.engine.flow import Trial
from speechdistill.engine.monitor import Work

_UNITS = ("cpu", "gpu")


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The cost of `num_samples`, without start-up. `hours` is the time on the pools of the trial; `money` is None if
    something that takes hours has no price."""

    num_samples: int
    trial_samples: int
    trial_rejected: int
    cpu_hours: float
    gpu_hours: float
    output_gb: float
    hours: float
    money: float | None


def estimate(trial: Trial, num_samples: int, price: Mapping[str, float]) -> Estimate:
    """Scale the cost of a trial to `num_samples`. GPUs are charged while their actors work."""
    scale = num_samples / max(1, trial.num_ids) / 3600
    work = {stage.name: (stage, trial.work.get(stage.name, Work())) for stage in trial.stages}
    cpu_hours = sum(done.cpu_s for done in trial.work.values()) * scale
    gpu_hours = sum(done.busy_s * stage.pool.num_gpus for stage, done in work.values()) * scale
    spent = {"cpu": cpu_hours, "gpu": gpu_hours}
    known = all(unit in price for unit in _UNITS if spent[unit])
    # The slowest pool sets the pace.
    hours = max(done.busy_s / stage.pool.actors for stage, done in work.values()) * scale
    return Estimate(
        num_samples=num_samples,
        trial_samples=trial.num_ids,
        trial_rejected=trial.num_ids - trial.labelled,
        cpu_hours=cpu_hours,
        gpu_hours=gpu_hours,
        output_gb=trial.size_bytes / max(1, trial.num_ids) * num_samples / 1e9,
        hours=hours,
        money=sum(amount * spent[unit] for unit, amount in price.items()) if known else None,
    )
