"""The weighted mean of several teachers, and how far they disagree."""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from speechdistill.io.errors import UserError
from speechdistill.models.label import Label, Unscorable, logits
from speechdistill.models.label import Teacher as Member

_USAGE = "give two teachers or more with their weights, such as ensemble:distillmos=0.7,dnsmos_p808=0.3"


class Teacher:
    """The mean of its members' scores, weighted; the logit is the mean's.

    `weights` says NAME=WEIGHT for each member, with commas between; only their ratio counts. A name is that of a
    teacher with its released weights, or a student's address; `load` loads a member. `disagreement` is the
    weighted standard deviation of the members' scores: of the windows that a member judges one by one it tells nothing.
    A wave that one member cannot judge has no label, for that member's reason. It is intrusive where a member is.
    Raises what `load` raises, and `UserError` for another text.
    """

    def __init__(
        self,
        weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
        hop_s: float = 1.0,
        *,
        load: Callable[[str], Member],
    ) -> None:
        shares = _shares(weights or "")
        self._names = list(shares)
        self._shares = np.array(list(shares.values()))
        self._members = [load(name) for name in shares]
        self.name = "ensemble:" + ",".join(f"{name}={share:g}" for name, share in shares.items())
        self.intrusive = any(member.intrusive for member in self._members)
        parts = zip(self._members, shares.values(), strict=True)
        lines = sorted(f"{member.weights_hash} {share}\n" for member, share in parts)
        self.weights_hash = hashlib.sha256("".join(lines).encode()).hexdigest()

    def label(
        self, waves: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None
    ) -> list[Label | Unscorable]:
        """One result per wave; waves are mono float32 at 16 kHz of any lengths."""
        said = [member.label(waves, references) for member in self._members]
        return [self._mean(labels) for labels in zip(*said, strict=True)]

    def timeline(self, wave: np.ndarray) -> list[tuple[float, float | None]]:
        """(start in s, mean score) for each second, None where a member has none; raises what the members do."""
        lines = [member.timeline(wave) for member in self._members]
        return [
            (second[0][0], self._mean_or_none([score for _, score in second])) for second in zip(*lines, strict=True)
        ]

    def _mean(self, labels: Sequence[Label | Unscorable]) -> Label | Unscorable:
        scores = []
        for name, label in zip(self._names, labels, strict=True):
            if isinstance(label, Unscorable):
                return Unscorable(f"{name}: {label}")
            scores.append(label.score)
        mean = float(self._shares @ scores)
        deviation = math.sqrt(self._shares @ (np.array(scores) - mean) ** 2)
        return Label(mean, float(logits(np.array(mean))), deviation)

    def _mean_or_none(self, scores: list[float | None]) -> float | None:
        known = [score for score in scores if score is not None]
        return float(self._shares @ known) if len(known) == len(scores) else None


def _shares(text: str) -> dict[str, float]:
    """The members and their weights, which sum to 1, in the order of the names."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")  # a folder's name may have one too
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or name in weights or not 0 < weight < math.inf:
            raise UserError(f"{part!r} in ensemble:{text} is no new NAME=WEIGHT with a weight above 0", _USAGE)
        weights[name] = weight
    if len(weights) < 2:
        raise UserError(f"ensemble:{text} has one member", _USAGE)
    total = math.fsum(weights.values())
    return {name: round(weights[name] / total, 12) for name in sorted(weights)}
