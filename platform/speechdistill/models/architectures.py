# models/: networks, and how they are used: scorers, teachers/, served models.
"""The architectures of our checkpoints: how each is built and how it scores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from speechdistill.io import checkpoint
from speechdistill.io.checkpoint import CONV_TRANSFORMER, ENCODER_AND_HEAD, HEAD_ABOVE_ENCODER, Files
from speechdistill.io.errors import UserError
from speechdistill.models import student_scorer
from speechdistill.models.options import TeacherOptions
from speechdistill.models.student import student_of
from speechdistill.models.windowed import WindowScorer

_DEFAULTS = TeacherOptions()


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How checkpoints of one architecture are used; `teacher` is their name in labels.

    `build` makes the network from the files of a folder and the encoder's place, None for its place in training.
    `score` makes a teacher of that network.
    """

    teacher: str
    build: Callable[[Files, str, str | None], nn.Module]
    score: Callable[[Any, Files, str, TeacherOptions], WindowScorer]


def network(files: Files, folder: str, encoder: str | None = None) -> nn.Module:
    """Build the network of a checkpoint; `encoder` is the place of a head's encoder, if it has moved since training.

    Raises `TableError` for files that do not fit, `WeightsError` if the encoder is missing, and `UserError` if it is
    another one, or the network needs none.
    """
    return of(files, folder).build(files, folder, encoder)


def scorer(folder: str, options: TeacherOptions = _DEFAULTS) -> WindowScorer:
    """Make a teacher of the checkpoint in a folder; the weights in `options` are a head's encoder.

    Raises `TableError` for a folder without a checkpoint, `UserError` for wrong options, and the errors of `network`.
    """
    files = checkpoint.read(folder)
    architecture = of(files, folder)
    built = architecture.build(files, folder, options.weights)
    return architecture.score(built, files, architecture.teacher, options)


def of(files: Files, folder: str) -> Architecture:
    """Look up the architecture of a checkpoint; raise `TableError` for an unknown one."""
    with checkpoint.fitting(folder):
        if files.architecture not in ARCHITECTURES:
            raise ValueError(f"architecture {files.architecture!r}; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[files.architecture]


def _student(files: Files, folder: str, encoder: str | None) -> nn.Module:
    if encoder:
        raise UserError(f"{folder} holds a student, which takes no other weights", f"leave {encoder} out")
    return student_of(files, folder).network


def _score_student(network: Any, files: Files, name: str, options: TeacherOptions) -> WindowScorer:
    return student_scorer.scorer(network, name, files.weights_hash, options)


# Imported when needed: the code that MLflow stores with a student is without the encoder's.


def _head(files: Files, folder: str, encoder: str | None) -> nn.Module:
    from speechdistill.models import encoder_scorer

    return encoder_scorer.head_network(files, folder, encoder)


def _teacher(files: Files, folder: str, encoder: str | None) -> nn.Module:
    from speechdistill.models import encoder_scorer

    return encoder_scorer.teacher_network(files, folder, encoder)


def _score_encoder(network: Any, files: Files, name: str, options: TeacherOptions) -> WindowScorer:
    from speechdistill.models import encoder_scorer

    return encoder_scorer.trained_scorer(network, files, name, options)


ARCHITECTURES = {
    CONV_TRANSFORMER: Architecture(teacher="student", build=_student, score=_score_student),
    HEAD_ABOVE_ENCODER: Architecture(teacher="quality_head", build=_head, score=_score_encoder),
    ENCODER_AND_HEAD: Architecture(teacher="trained_teacher", build=_teacher, score=_score_encoder),
}
