"""Hashes by which configurations and files are recognised, and where two configurations differ."""

import hashlib
import json
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any

from speechdistill.io import storage

_LONGEST = 60  # characters of a value in a difference

ADDED = {"speechdistill": "added"}
"""Metadata of a field that was added to a class after instances of it had been stored: see `identity`."""


def identity(config: Any) -> dict[str, Any]:
    """The fields of a dataclass as JSON values, those of nested dataclasses too.

    Fields marked `field(metadata=ADDED)` are left out at their default, so that a new option does not turn every run
    that is stored into one with another configuration.
    """
    kept = {field.name: getattr(config, field.name) for field in fields(config) if not _is_left_out(config, field)}
    return {name: identity(value) if is_dataclass(value) else value for name, value in kept.items()}


def _is_left_out(config: Any, field: Field[Any]) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    is_added = all(field.metadata.get(key) == value for key, value in ADDED.items())
    return is_added and bool(getattr(config, field.name) == default)


def of(value: Any) -> str:
    """sha256 of the canonical JSON of `value`: equal configurations have equal fingerprints."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def of_file(uri: str) -> str:
    """sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with storage.access(uri), storage.opened(uri) as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def shortened(text: str, limit: int) -> str:
    """At most `limit` characters of a text: one that is cut ends in its length and hash, which tell it from others."""
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()
    end = f"… (cut: {len(text):,} characters, sha256 {digest[:16]})"
    return text[: limit - len(end)] + end


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """List the differences of two JSON values, as lines `recipe.seed: 1 -> 2`; long values are cut."""
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
