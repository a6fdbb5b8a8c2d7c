"""What was trained here as a scorer of waves, whatever it is: a student, or a head above a speech encoder."""

from typing import Any

from speechdistill.io import checkpoint
from speechdistill.io.errors import UserError
from speechdistill.models.student import student_of
from speechdistill.models.student_scorer import Scorer
from speechdistill.models.windowed import Windowed


def scorer(folder: str, encoder: str | None = None, **options: Any) -> Windowed:
    """The scorer of the checkpoint in a folder; `options` are device, dtype, batch_s and hop_s.

    `encoder` is the place of the speech encoder of a head, where that is another than in training. Raises `TableError`
    for a folder without a checkpoint, and what the scorers raise.
    """
    files = checkpoint.read(folder)
    if files.architecture == checkpoint.CONV_TRANSFORMER:
        if encoder:
            raise UserError(f"{folder} holds a student, which takes no other weights", f"leave {encoder} out")
        student = student_of(files, folder)
        return Scorer(student.network, "student", student.weights_hash, **options)
    from speechdistill.models import encoder_scorer  # transformers is not needed for a student

    return encoder_scorer.from_files(files, folder, encoder, **options)
