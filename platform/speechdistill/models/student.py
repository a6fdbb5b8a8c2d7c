"""A student, a `ConvTransformer`, as a checkpoint."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

from speechdistill.io import checkpoint
from speechdistill.models.networks.conv_transformer import ConvTransformer, ConvTransformerConfig


class Student(NamedTuple):
    """A network in evaluation mode, the provenance that it was saved with, and the sha256 of its weights file."""

    network: ConvTransformer
    provenance: dict[str, Any]
    weights_hash: str


def save_student(network: ConvTransformer, folder: str, provenance: Mapping[str, Any]) -> None:
    """Write a student to a local folder or URL."""
    checkpoint.write(network, folder, checkpoint.CONV_TRANSFORMER, asdict(network.config), provenance)


def load_student(folder: str) -> Student:
    """Read a checkpoint of `save_student`; raise `TableError` naming the file that is missing or does not fit."""
    return student_of(checkpoint.read(folder), folder)


def student_of(files: checkpoint.Files, folder: str) -> Student:
    """Build the student from the files of `folder`; raise `TableError` if they hold another network."""
    with checkpoint.fitting(folder):
        if files.architecture != checkpoint.CONV_TRANSFORMER:
            raise ValueError(f"architecture {files.architecture!r}; a student is {checkpoint.CONV_TRANSFORMER!r}")
        network = ConvTransformer(ConvTransformerConfig(**files.config))
        network.load_state_dict(files.weights)
    return Student(network.eval(), files.provenance, files.weights_hash)
