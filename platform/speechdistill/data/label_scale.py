"""Scores of listeners as training targets: the scales of listening tests mapped to one (Distill-MOS, section III-A)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from speechdistill.io import storage, table
from speechdistill.io.errors import TableError
from speechdistill.metrics import logistic

SCHEMA = "label_transform.v1"
# 1 and 5 have no logit; 1.02 and 4.98 replace them, about the resolution of a mean of fifty votes.
_MARGIN = 0.005


@dataclass(frozen=True)
class Scale:
    """Maps a quality logit z to the score `1 + 4 * sigmoid(a * z + b)` of a listening test."""

    a: float = 1.0
    b: float = 0.0

    def mos(self, logit: np.ndarray | float) -> np.ndarray:
        """Return the score from 1 to 5."""
        # Not by `logistic.sigmoid`, whose last bit differs: stored scales were fitted with this formula.
        return np.asarray(1 + 4 / (1 + np.exp(-(self.a * logit + self.b))))

    def logit(self, mos: np.ndarray | float) -> np.ndarray:
        """Return the quality logit of a score from 1 to 5; the ends have the logits of 1.02 and 4.98."""
        return np.asarray((logistic.logits(mos, _MARGIN) - self.b) / self.a)


@dataclass(frozen=True)
class LabelTransform:
    """Maps scores of a dataset to the universal scale. Scores of other datasets stay the same."""

    datasets: Mapping[str, Scale] = field(default_factory=dict)
    universal: Scale = Scale()

    @classmethod
    def read(cls, uri: str | None) -> Self:
        """Read a file of schema `label_transform.v1`; None is the identity. Raises `TableError` for an invalid file."""
        if uri is None:
            return cls()
        document = storage.read_json(uri)
        if document is None:
            raise TableError(
                f"{uri}: no such file", "give the path of a label transform, or omit it to use scores as they are"
            )
        table.check_json(document, SCHEMA, uri)
        datasets = {name: Scale(**scale) for name, scale in document["datasets"].items()}
        return cls(datasets, Scale(**document["universal"]))

    def __call__(self, mos: float, dataset: str | None) -> float:
        """Return the score from 1 to 5 on the universal scale."""
        scale = self.datasets.get(dataset or "", self.universal)
        if scale == self.universal:
            return mos
        return float(self.universal.mos(scale.logit(mos)))

    def to_json(self) -> dict[str, Any]:
        """Return the document of the schema."""
        return {
            "universal": vars(self.universal),
            "datasets": {name: vars(scale) for name, scale in self.datasets.items()},
        }
