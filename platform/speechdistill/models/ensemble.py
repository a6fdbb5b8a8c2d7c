"""The weighted mean of several teachers, and how far they disagree."""

import hashlib
import math
from collections.abc import Callable, Sequence

import numpy as np

from speechdistill.io.errors import UserError
from speechdistill.models.label import Label, Teacher, Unscorable, logits

PREFIX = "ensemble:"
_USAGE = "give two teachers or more with their weights, such as ensemble:distillmos=0.7,dnsmos_p808=0.3"


class Ensemble:
    """The weighted mean of the members' scores; the logit is the mean's.

    `shares` is NAME=WEIGHT for each member, separated by commas; only the ratio of the weights counts. `load` loads the
    member of a name. `disagreement` is the weighted standard deviation of the members' scores, without the spread over
    the windows of one member. A wave that one member cannot score has no label, for that member's reason. An ensemble
    is intrusive if a member is. Raises `UserError` for another text, and the errors of `load`.
    """

    def __init__(self, shares: str, load: Callable[[str], Teacher]) -> None:
        members = _shares(shares)
        self._names = list(members)
        self._shares = np.array(list(members.values()))
        self._members = [load(name) for name in members]
        self.name = PREFIX + ",".join(f"{name}={share:g}" for name, share in members.items())
        self.intrusive = any(member.intrusive for member in self._members)
        parts = zip(self._members, members.values(), strict=True)
        lines = sorted(f"{member.weights_hash} {share}\n" for member, share in parts)
        self.weights_hash = hashlib.sha256("".join(lines).encode()).hexdigest()

    def label(
        self, waves: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None
    ) -> list[Label | Unscorable]:
        """Return one result per wave; waves are mono float32 at 16 kHz of any lengths."""
        by_member = [member.label(waves, references) for member in self._members]
        return [self._mean(labels) for labels in zip(*by_member, strict=True)]

    def timeline(self, wave: np.ndarray) -> list[tuple[float, float | None]]:
        """Return (start in s, mean score) for each second, None if a member has none; raises the members' errors."""
        lines = [member.timeline(wave) for member in self._members]
        return [
            (second[0][0], self._mean_or_none([score for _, score in second])) for second in zip(*lines, strict=True)
        ]

    def parameters(self) -> None:
        """Return None: members may share an encoder, and not all are networks of torch."""

    def _mean(self, labels: Sequence[Label | Unscorable]) -> Label | Unscorable:
        scores = []
        for name, label in zip(self._names, labels, strict=True):
            if isinstance(label, Unscorable):
                return Unscorable(f"{name}: {label}")
            scores.append(label.score)
        mean = float(self._shares @ scores)
        deviation = math.sqrt(self._shares @ (np.array(scores) - mean) ** 2)
        return Label(mean, float(logits(mean)), deviation)

    def _mean_or_none(self, scores: list[float | None]) -> float | None:
        known = [score for score in scores if score is not None]
        return float(self._shares @ known) if len(known) == len(scores) else None


def _shares(text: str) -> dict[str, float]:
    """Return the members and their weights, which sum to 1, sorted by name."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, number = part.rpartition("=")  # a folder's name may contain "=" as well
        try:
            weight = float(number)
        except ValueError:
            weight = 0.0
        if not name or name in weights or not 0 < weight < math.inf:
            raise UserError(f"{part!r} in {PREFIX}{text} is no new NAME=WEIGHT with a weight above 0", _USAGE)
        weights[name] = weight
    if len(weights) < 2:
        raise UserError(f"{PREFIX}{text} has one member", _USAGE)
    total = math.fsum(weights.values())
    return {name: round(weights[name] / total, 12) for name in sorted(weights)}
