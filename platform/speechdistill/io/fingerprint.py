"""Hashes that identify configurations and files, and the differences of two configurations."""

import hashlib
import json
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from speechdistill.io import storage

_LONGEST = 60  # characters of a value in a difference

ADDED = {"speechdistill": "added"}
"""Metadata of a field that was added to a class after its instances had been stored: see `identity`."""


def identity(config: Any) -> dict[str, Any]:
    """Return the fields of a dataclass, nested ones included, as JSON values.

    Fields marked `field(metadata=ADDED)` are left out at their default, so that a new option does not change the
    configuration of stored runs.
    """
    kept = {field.name: getattr(config, field.name) for field in fields(config) if not _is_left_out(config, field)}
    return {name: identity(value) if is_dataclass(value) else value for name, value in kept.items()}


def _is_left_out(config: Any, field: Field[Any]) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    is_added = all(field.metadata.get(key) == value for key, value in ADDED.items())
    return is_added and bool(getattr(config, field.name) == default)


def of(value: Any) -> str:
    """Return the sha256 of the canonical JSON of `value`: equal configurations have equal fingerprints."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def of_file(uri: str) -> str:
    """Return the sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with storage.access(uri), storage.opened(uri) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def shortened(text: str, limit: int) -> str:
    """Return at most `limit` characters of a text. A cut text ends in its length and hash, which identify it."""
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    end = f"… (cut: {len(text):,} characters, sha256 {digest[:16]})"
    return text[: limit - len(end)] + end


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Return the differences of two JSON values, as lines `recipe.seed: 1 -> 2`; long values are cut."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [
            line
            for key in keys
            for line in differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        ]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = enumerate(zip(old, new, strict=True))
        return [line for i, (one, other) in pairs for line in differences(one, other, f"{path}.{i}")]
    return [] if old == new else [f"{path}: {_brief(old)} -> {_brief(new)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
