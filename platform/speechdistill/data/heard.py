"""The scored clips that a model was trained on and selected by, from its provenance; comparisons mark them."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from speechdistill.io.checkpoint import CLIPS

TRAINED, SELECTED = "trained on", "selected on"


def record(train: pa.Table | None, validation: pa.Table | None) -> dict[str, str]:
    """Return clips of schema `clip.v1` as JSON for `CLIPS` of a provenance: sorted ids, 8 bytes each, in base64."""
    parts = {TRAINED: train, SELECTED: validation}
    return {how: _packed(clips["clip_id"].to_pylist()) for how, clips in parts.items() if clips is not None}


def marks(provenance: Mapping[str, Any], clip_ids: Sequence[str]) -> list[str | None]:
    """Return a mark for each clip: `TRAINED`, `SELECTED` (the best checkpoint was chosen by it) or None.

    The clips of a model also count for models that were trained from it. Copies of a file at other addresses, and clips
    of models of earlier versions, are not recognised.
    """
    ids = _numbers(clip_ids)
    known = {how: [_unpacked(one[CLIPS].get(how, "")) for one in ancestry(provenance) if CLIPS in one] for how in _HOWS}
    trained, selected = (np.isin(ids, np.concatenate([_NO_IDS, *known[how]])) for how in _HOWS)
    return [TRAINED if one else SELECTED if other else None for one, other in zip(trained, selected, strict=True)]


def mark_of_samples(provenance: Mapping[str, Any], run: Mapping[str, Any]) -> str | None:
    """Return `TRAINED` if the held-out samples of a label run may have trained a model, else None.

    `run` has the form of an entry of `shards` in the provenance. A run with the same manifest counts too. Samples are
    unknown to the model if its training held them out as well, by the hashes of names.
    """
    of_models = [one["shards"] for one in ancestry(provenance) if isinstance(one.get("shards"), list)]
    for shards in (shards for of_model in of_models for shards in of_model):
        if any(shards.get(key) == run[key] is not None for key in ("fingerprint", "clips_sha256")):
            theirs = (shards.get("held_out") or {}).get("test", {}).get("hash_up_to", -1)
            if theirs < run["held_out"]["test"]["hash_up_to"]:
                return TRAINED
    return None


def ancestry(provenance: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the provenance of a model, then of the model that it was trained from, and so on."""
    yield provenance
    if isinstance(first := provenance.get("init"), Mapping):
        yield from ancestry(first)


_HOWS = (TRAINED, SELECTED)
_NO_IDS = np.zeros(0, "<u8")


def _numbers(clip_ids: Sequence[str]) -> np.ndarray:
    return np.array([int(clip_id, 16) for clip_id in clip_ids], "<u8")


def _packed(clip_ids: Sequence[str]) -> str:
    return base64.b64encode(np.sort(_numbers(clip_ids)).tobytes()).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<u8")
