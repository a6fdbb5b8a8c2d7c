"""Checkpoints of trained networks: `model.safetensors`, and `student.json` with configuration and provenance."""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from speechdistill.io import storage
from speechdistill.io.errors import StorageError, TableError

if TYPE_CHECKING:  # safetensors imports torch when weights are read or written
    import torch
    from torch import nn

WEIGHTS, ABOUT = "model.safetensors", "student.json"
CONV_TRANSFORMER = "conv_transformer"
HEAD_ABOVE_ENCODER = "head_above_encoder"
"""The architecture of a checkpoint with the weights of a head alone."""

ENCODER_AND_HEAD = "encoder_and_head"
"""The architecture of a checkpoint with the weights of both."""

CLIPS = "labeled_clips"
"""Key of a provenance for the clips that a model was trained on: a long list, for programs only."""


class Files(NamedTuple):
    """Contents of the two files, and the sha256 of the weights file."""

    architecture: str
    config: dict[str, Any]
    provenance: dict[str, Any]
    weights: "dict[str, torch.Tensor]"
    weights_hash: str

    @property
    def has_encoder(self) -> bool:
        """Whether the model has a speech encoder, in the checkpoint or elsewhere; a student has none."""
        return "encoder" in self.config


def write(
    network: "nn.Module", folder: str, architecture: str, config: Mapping[str, Any], provenance: Mapping[str, Any]
) -> None:
    """Write a network's weights in float32, and its description; `student.json` is written last."""
    from safetensors.torch import save as to_bytes

    state = {key: _portable(value) for key, value in network.state_dict().items()}
    storage.publish(to_bytes(state), f"{folder}/{WEIGHTS}")
    about = {"architecture": architecture, "config": dict(config), "provenance": dict(provenance)}
    storage.publish_json(about, f"{folder}/{ABOUT}")


def read(folder: str) -> Files:
    """Read the files of `write`; raises `TableError` naming the file that is missing or damaged."""
    about = storage.read_json(f"{folder}/{ABOUT}")
    if about is None:
        raise TableError(f"{folder} holds no checkpoint ({ABOUT} is missing)", "give the folder of a checkpoint")
    with fitting(folder):
        data = _read(f"{folder}/{WEIGHTS}")
        digest = hashlib.sha256(data).hexdigest()
        return Files(about["architecture"], about["config"], about["provenance"], _weights(data), digest)


def provenance(folder: str) -> dict[str, Any]:
    """Return the description given to `write`, without reading the weights; empty if there is none."""
    return dict((storage.read_json(f"{folder}/{ABOUT}") or {}).get("provenance") or {})


def brief(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return a provenance without `CLIPS`, those of the model that it started from included."""
    return {
        key: brief(value) if key == "init" and isinstance(value, Mapping) else value
        for key, value in provenance.items()
        if key != CLIPS
    }


def size(folder: str) -> int:
    """Return the bytes of the weights file."""
    fs, path = storage.file_system(f"{folder}/{WEIGHTS}")
    with storage.access(folder):
        return int(fs.size(path))


@contextmanager
def fitting(folder: str) -> Iterator[None]:
    """Raise `TableError` if the body fails because a folder's files do not fit the code."""
    try:
        yield
    except StorageError:  # is a ValueError as well
        raise
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise TableError(
            f"{folder} holds no checkpoint of this version ({type(error).__name__}: {reason})",
            "give the folder of another checkpoint, or train the model again",
        ) from error


def copy(folder: str, target: str) -> None:
    """Copy a student's two files to another folder or URL."""
    for name in (WEIGHTS, ABOUT):
        storage.publish(_read(f"{folder}/{name}"), f"{target}/{name}")


def _read(uri: str) -> bytes:
    with storage.access(uri), storage.opened(uri) as file:
        return bytes(file.read())


def _weights(data: bytes) -> "dict[str, torch.Tensor]":
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        weights: dict[str, torch.Tensor] = from_bytes(data)
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} is damaged: {error}") from error
    return weights


def _portable(value: "torch.Tensor") -> "torch.Tensor":
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).contiguous()
