"""A trained student as two files in a folder: `model.safetensors` and `student.json`."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, NamedTuple

import fsspec
import torch

from speechdistill import table
from speechdistill.students.conv_transformer import ConvTransformer, ConvTransformerConfig

WEIGHTS, ABOUT = "model.safetensors", "student.json"


class Student(NamedTuple):
    """A network in evaluation mode, what `save` was told of it, and the sha256 of its weights file."""

    network: ConvTransformer
    provenance: dict[str, Any]
    weights_hash: str


def save(network: ConvTransformer, folder: str, provenance: Mapping[str, Any]) -> None:
    """Write a student to a local folder or URL, its weights in float32; `student.json` is written last."""
    from safetensors.torch import save as to_bytes

    state = {key: _portable(value) for key, value in network.state_dict().items()}
    table.publish(to_bytes(state), f"{folder}/{WEIGHTS}")
    about = {"architecture": "conv_transformer", "config": asdict(network.config), "provenance": dict(provenance)}
    table.publish_json(about, f"{folder}/{ABOUT}")


def load(folder: str) -> Student:
    """Read what `save` wrote. Raises `TableError` naming the file that is missing or does not fit."""
    about = table.read_json(f"{folder}/{ABOUT}")
    if about is None:
        raise table.TableError(f"{folder} holds no student ({ABOUT} is missing); give the folder of a checkpoint")
    try:
        if about["architecture"] != "conv_transformer":
            raise ValueError(f"architecture {about['architecture']!r} is unknown")
        network = ConvTransformer(ConvTransformerConfig(**about["config"]))
        data = _read(f"{folder}/{WEIGHTS}")
        network.load_state_dict(_weights(data))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise table.TableError(
            f"{folder} holds no student of this version ({type(error).__name__}: {reason})"
        ) from error
    return Student(network.eval(), about["provenance"], hashlib.sha256(data).hexdigest())


def copy(folder: str, target: str) -> None:
    """Copy a student's two files to another folder or URL."""
    for name in (WEIGHTS, ABOUT):
        table.publish(_read(f"{folder}/{name}"), f"{target}/{name}")


def _read(uri: str) -> bytes:
    with table.storage(uri), fsspec.open(uri, "rb") as file:
        return bytes(file.read())


def _weights(data: bytes) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    try:
        weights: dict[str, torch.Tensor] = from_bytes(data)
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS} is damaged: {error}") from error
    return weights


def _portable(value: torch.Tensor) -> torch.Tensor:
    value = value.detach().cpu()
    return (value.float() if value.is_floating_point() else value).contiguous()
