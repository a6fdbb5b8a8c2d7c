# comparing/: models on the same clips: scores, figures, tables, plots, page.
"""The models of a comparison: names and addresses become models that any worker can load, with their provenance."""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from speechdistill.comparing import paper
from speechdistill.io import fingerprint, storage
from speechdistill.io.errors import UserError
from speechdistill.io.version import __version__
from speechdistill.models.label import Teacher
from speechdistill.models.load import load_teacher, teacher_names
from speechdistill.models.options import TeacherOptions
from speechdistill.tracking import registry
from speechdistill.tracking.run import tracking_uri

LABELED_ONLY, DISTILLED, TEACHER, BASELINE = "labeled only", "distilled", "teacher", "baseline"
RELEASED = "distilled, released"
UNKNOWN = "of unknown training"
"""Kinds of models in the paper's Figure 3, beside `pruned (CRITERION)`."""

_ENSEMBLE = "ensemble:"
_MEMBER = re.compile(rf"(?!.*{_ENSEMBLE}).+=\s*[\d.]+")


class Candidate(NamedTuple):
    """A model to compare: `name` is for tables; `teacher`, `weights` and `head` are for `load_teacher`.

    `parameters` is None if unknown.
    """

    name: str
    address: str
    teacher: str
    weights: str | None
    head: str | None
    sha256: str
    parameters: int | None
    series: str
    provenance: dict[str, Any]

    @property
    def key(self) -> str:
        """Hash of the weights and of the code's version: models with equal keys have equal scores."""
        return fingerprint.of([self.sha256, __version__])[:16]


def listed(text: str) -> dict[str, str]:
    """Parse `A,NAME=B` to addresses by name (by default the address itself); raises `UserError`."""
    addresses: dict[str, str] = {}
    for word in _words(text):
        match = re.fullmatch(r"([\w.+-]+)=(.+)", word)
        name, address = match.groups() if match else (word, word)
        if name in addresses:
            raise UserError(f"--models names {name!r} twice", f"give one of them another name: NAME={address}")
        addresses[name] = address
    if not addresses:
        raise UserError("--models is empty", "give models such as distillmos,models:/NAME@champion")
    return addresses


def _words(text: str) -> list[str]:
    """Split a text at commas, except those inside an ensemble."""
    words: list[str] = []
    for word in filter(None, map(str.strip, text.split(","))):
        if words and _ENSEMBLE in words[-1] and _MEMBER.fullmatch(word):
            words[-1] += f",{word}"
        else:
            words.append(word)
    return words


def load(
    wanted: Mapping[str, str],
    out: str,
    weights: Mapping[str, str],
    head: str | None = None,
    tracking: str | None = None,
) -> list[Candidate]:
    """Load all models of `listed` once; models that were trained here are copied below `out`, for workers.

    `weights` are files by model name, or places of trained heads' encoders. `head` is for xlsr. `tracking` is a folder
    of runs for addresses in MLflow if MLFLOW_TRACKING_URI is not set. Raises a `UserError` that names all models which
    cannot be loaded, with the reasons.
    """
    if unknown := sorted(set(weights) - set(wanted)):
        raise UserError(f"--weights names {unknown}, which --models does not", f"choose from {list(wanted)}")
    if head and "xlsr" not in wanted.values():
        reason = f"--head {head} is for xlsr, which --models does not name; it has {list(wanted.values())}"
        raise UserError(reason, "leave it out, or add xlsr")
    models, failed = [], []
    uri = tracking_uri(tracking) if tracking and not os.environ.get("MLFLOW_TRACKING_URI") else None
    for name, address in wanted.items():
        try:
            if _is_trained(address):
                models.append(_trained(name, address, out, uri, weights.get(name)))
            else:
                models.append(_built_in(name, address, weights.get(name), head if address == "xlsr" else None))
        except UserError as error:
            failed.append(f"\n  {name}: {error}")
    if failed:
        reason = f"{len(failed)} of {len(wanted)} models cannot be loaded:{''.join(failed)}\n"
        raise UserError(reason, "correct these models, or leave them out of --models")
    keys: dict[str, str] = {}
    for model in models:
        if (other := keys.setdefault(model.key, model.name)) != model.name:
            raise UserError(f"{other} and {model.name} are the same model", "give it once")
    return models


def _is_trained(address: str) -> bool:
    if address in teacher_names() or address.startswith(_ENSEMBLE):
        return False
    return "/" in address or os.path.isdir(address)  # noqa: PTH112


def _trained(name: str, address: str, out: str, uri: str | None, encoder: str | None) -> Candidate:
    """Load a model that was trained here: a student, a head above the speech encoder at `encoder`, a pruned teacher."""
    from speechdistill.io import checkpoint

    with registry.student_folder(address, uri) as folder:
        files = checkpoint.read(folder)
        encoder = encoder and storage.absolute(encoder)
        teacher = load_teacher(folder, TeacherOptions(weights=encoder, device="cpu"))
        copy = f"{out}/models/{teacher.weights_hash[:16]}"
        checkpoint.copy(folder, copy)
    pruned = "pruning" in files.provenance
    parameters = _parameters(teacher, pruned)
    series = _series(files.provenance) if pruned or not files.has_encoder else TEACHER
    return Candidate(name, address, copy, encoder, None, teacher.weights_hash, parameters, series, files.provenance)


def _built_in(name: str, address: str, weights: str | None, head: str | None) -> Candidate:
    if weights and "://" not in weights:
        weights = storage.absolute(weights)
    head = head and storage.absolute(head)
    # On the CPU, so that no GPU is held: only name, hash and size are used here.
    teacher = load_teacher(address, TeacherOptions(weights=weights, head=head, device="cpu"))
    if teacher.intrusive:
        raise UserError(f"{address} compares with clean originals, which the clips lack", "leave it out")
    series = {"distillmos": RELEASED, "xlsr": TEACHER}.get(address, BASELINE)
    return Candidate(name, address, address, weights, head, teacher.weights_hash, _parameters(teacher), series, {})


def _parameters(teacher: Teacher, pruned: bool = False) -> int | None:
    """Count the parameters that scoring uses, for a pruned model those that are not zero.

    A model without a torch network has the number that the paper prints, if any.
    """
    if size := teacher.parameters():
        return size.nonzero if pruned else size.stored
    row = paper.row_of(teacher.name)
    return round(paper.rows()[row].params_m * 1e6) if row else None


def _series(provenance: Mapping[str, Any]) -> str:
    if pruning := provenance.get("pruning"):
        return f"pruned ({pruning.get('criterion', 'unknown')})"
    if provenance.get("shards"):
        return DISTILLED
    if "init" in provenance:  # fine-tuned from another model
        return _series(provenance["init"])
    return LABELED_ONLY if "shards" in provenance else UNKNOWN
