"""Worker of the labelling job that scores samples: from audio to labels."""

import os
import threading
import traceback
from collections.abc import Sequence

import numpy as np

from speechdistill.engine.isolate import CannotWork, Row
from speechdistill.io import audio
from speechdistill.io.errors import UserError
from speechdistill.models.label import Label, Unscorable
from speechdistill.models.load import load_teacher
from speechdistill.models.options import TeacherOptions


class Teach:
    """Worker of the last stage: the teacher scores exactly the stored int16 samples.

    An intrusive teacher also takes the clean `reference` of each row, which is stored only with `keep_reference`.
    """

    def __init__(
        self,
        teacher: str,
        weights: str | None,
        head: str | None,
        dtype: str,
        batch_s: float | None,
        sha256: str,
        keep_reference: bool = True,
    ) -> None:
        import torch

        torch.set_num_threads(1)  # CPUs are filled by actors, not by threads
        self._computing = threading.Lock()
        options = TeacherOptions(weights=weights, head=head, dtype=dtype, batch_s=batch_s)
        self._teacher = load_teacher(teacher, options)
        if self._teacher.weights_hash != sha256:
            reason = f"{teacher} has other weights on this node than on the driver"
            raise UserError(reason, "install the same weights on all nodes")
        self._carried: Row = {} if keep_reference else {"reference": None}

    def __call__(self, rows: list[Row]) -> list[Row | Exception]:
        """Label rows; several threads may call, of which one computes while the others decode."""
        waves, references = _decoded(rows, "audio"), None
        if self._teacher.intrusive:
            references = _decoded(rows, "reference")
        with self._computing:
            return [self._row(label) for label in self._labels(waves, references)]

    def _labels(
        self, waves: Sequence[np.ndarray], references: Sequence[np.ndarray] | None
    ) -> Sequence[Label | Unscorable]:
        import torch

        try:
            return self._teacher.label(waves, references)
        except torch.OutOfMemoryError as error:  # for a single window: teachers split their batches first
            reason = f"{self._teacher.name} does not fit the GPU's memory ({str(error).splitlines()[0]})"
            raise CannotWork(f"{reason}; give --dtype bfloat16, or fewer teachers per GPU by --teach-gpus 1") from error
        except torch.AcceleratorError:  # leaves the process unusable; `Isolated` starts another
            traceback.print_exc()
            os._exit(1)

    def _row(self, label: Label | Exception) -> Row | Exception:
        if isinstance(label, Exception):
            return label
        provenance = {"teacher": self._teacher.name, "teacher_hash": self._teacher.weights_hash}
        return {**label._asdict(), **provenance, **self._carried}


def _decoded(rows: list[Row], column: str) -> list[np.ndarray]:
    return [audio.decode(row[column], row["audio_format"]) for row in rows]
