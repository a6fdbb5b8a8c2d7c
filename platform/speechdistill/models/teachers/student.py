"""What was trained here as a teacher: from the folder of a checkpoint, or from MLflow."""

from collections.abc import Sequence

import numpy as np

from speechdistill.io.errors import UserError
from speechdistill.models import trained
from speechdistill.models.label import Label, Unscorable
from speechdistill.models.windowed import HOP_S
from speechdistill.tracking import registry


class Teacher:
    """A trained student or head.

    `weights` is a checkpoint's folder or URL (`io.checkpoint`), or an address of `registry.student_folder`; `encoder`
    the place of a head's speech encoder, where that is another than in training. Raises `RegistryError` or
    `TableError` naming what is not there, and what the scorers raise.
    """

    intrusive = False

    def __init__(
        self,
        weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
        hop_s: float = HOP_S,
        encoder: str | None = None,
    ) -> None:
        if weights is None:
            reason = "teacher 'student' has no released weights"
            raise UserError(reason, "give a checkpoint's folder as its weights")
        with registry.student_folder(weights) as folder:
            options = {"device": device, "dtype": dtype, "batch_s": batch_s, "hop_s": hop_s}
            self.scorer = trained.scorer(folder, encoder, **options)
        self.name, self.weights_hash = self.scorer.name, self.scorer.weights_hash

    def label(
        self, waves: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None
    ) -> list[Label | Unscorable]:
        return self.scorer.label(waves)

    def timeline(self, wave: np.ndarray) -> list[tuple[float, float | None]]:
        return self.scorer.timeline(wave)
