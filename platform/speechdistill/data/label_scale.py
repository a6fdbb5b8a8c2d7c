"""Scores of listeners as training targets: the scales of listening tests mapped to one (Distill-MOS, section III-A)."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from speechdistill.io import storage, table
from speechdistill.io.errors import TableError

SCHEMA = "label_transform.v1"
# 1 and 5 have no logit; 1.02 and 4.98 replace them, about the resolution of a mean of fifty votes.
_MARGIN = 0.005


@dataclass(frozen=True)
class Scale:
    """Maps a quality logit z to the score `1 + 4 * sigmoid(a * z + b)`."""

    a: float = 1.0
    b: float = 0.0


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
        quality = min(max((mos - 1) / 4, _MARGIN), 1 - _MARGIN)
        logit = (np.log(quality) - np.log1p(-quality) - scale.b) / scale.a
        return float(1 + 4 / (1 + np.exp(-(self.universal.a * logit + self.universal.b))))

    def to_json(self) -> dict[str, Any]:
        """Return the document of the schema."""
        return {
            "universal": vars(self.universal),
            "datasets": {name: vars(scale) for name, scale in self.datasets.items()},
        }
