"""Schedules of the learning rate: pure functions of the step."""

import math
from dataclasses import dataclass
from typing import Literal

from speechdistill.io.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The learning rate over a run, as a factor of its peak.

    After `warm_up` steps that rise linearly: constant; linear and cosine fall to zero at the end; tri-stage stays for
    `hold` steps and then falls exponentially to `last` (wav2vec 2.0, section 4.3).
    """

    shape: Literal["constant", "linear", "cosine", "tri-stage"] = "constant"
    warm_up: int = 0
    hold: int = 0
    last: float = 0.05

    def __post_init__(self) -> None:
        if min(self.warm_up, self.hold) < 0 or not 0 < self.last <= 1:
            raise UserError(f"Invalid schedule: {self}", "use at least 0 steps, and a last factor in (0, 1]")

    def factor(self, step: int, steps: int) -> float:
        """The factor of the update that follows `step` others, of `steps` in all."""
        if step < self.warm_up:
            return (step + 1) / self.warm_up
        begin = self.warm_up + (self.hold if self.shape == "tri-stage" else 0)
        gone = min(1.0, max(0, step - begin) / max(1, steps - begin))
        if self.shape == "linear":
            return 1 - gone
        if self.shape == "cosine":
            return (1 + math.cos(math.pi * gone)) / 2
        return self.last**gone if self.shape == "tri-stage" else 1.0
