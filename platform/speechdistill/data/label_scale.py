"""Listeners' scores as training targets: each listening test's scale mapped to one (Distill-MOS, section III-A)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from speechdistill.io import storage, table
from speechdistill.io.errors import TableError
from speechdistill.metrics import logistic

SCHEMA = "label_transform.v1"
# 1 and 5 have no logit. Their stand-ins, 1.02 and 4.98, are as far out as a mean of some fifty votes can tell.
_MARGIN = 0.005


@dataclass(frozen=True)
class Scale:
    """A listening test's scale: a quality logit z is the score `1 + 4 * sigmoid(a * z + b)`."""

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
    """Maps a score of a dataset to the universal scale; scores of datasets that are not named stay as they are."""

    datasets: Mapping[str, Scale] = field(default_factory=dict)
    universal: Scale = Scale()

    @classmethod
    def read(cls, uri: str | None) -> Self:
        """A file of schema `label_transform.v1`, or the identity; raises `TableError` naming what is wrong."""
        if uri is None:
            return cls()
        document = storage.read_json(uri)
        if document is None:
            raise TableError(
                f"{uri}: no such file", "give the path of a label transform, or none to use scores as they are"
            )
        table.check_json(document, SCHEMA, uri)
        datasets = {name: Scale(**scale) for name, scale in document["datasets"].items()}
        return cls(datasets, Scale(**document["universal"]))

    def __call__(self, mos: float, dataset: str | None) -> float:
        """The score from 1 to 5 on the universal scale."""
        scale = self.datasets.get(dataset or "", self.universal)
        if scale == self.universal:
            return mos
        return float(self.universal.mos(scale.logit(mos)))

    def to_json(self) -> dict[str, Any]:
        """The document of the schema."""
        return {
            "universal": vars(self.universal),
            "datasets": {name: vars(scale) for name, scale in self.datasets.items()},
        }
