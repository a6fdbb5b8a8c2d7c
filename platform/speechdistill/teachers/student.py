"""A student of ours as a teacher: from the folder of a checkpoint, or from MLflow."""

from speechdistill import registry, student_files
from speechdistill.scorer import HOP_S, Scorer


class Teacher(Scorer):
    """A trained student; its options are those of `Scorer`.

    `weights` is a checkpoint's folder or URL (`student_files`), or an address of `registry.student_folder`. Raises
    `RegistryError` or `TableError` naming what is not there, and `ValueError` for a wrong device, dtype, batch or hop.
    """

    def __init__(
        self,
        weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
        hop_s: float = HOP_S,
    ) -> None:
        if weights is None:
            raise ValueError("teacher 'student' has no released weights; give a checkpoint's folder as its weights")
        with registry.student_folder(weights) as folder:
            student = student_files.load(folder)
        super().__init__(student.network, "student", student.weights_hash, device, dtype, batch_s, hop_s)
