# comparing/: models on the same clips: scores, figures, tables, plots, page.
"""The models of a comparison: from names and addresses to what any worker can load, and what is known of them."""

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
UNKNOWN = "of unknown training"
"""What a model is in the paper's Figure 3, beside `pruned (CRITERION)`."""

_ENSEMBLE = "ensemble:"
_MEMBER = re.compile(rf"(?!.*{_ENSEMBLE}).+=\s*[\d.]+")


class Candidate(NamedTuple):
    """`name` in tables; `teacher`, `weights` and `head` for `load_teacher`; `parameters` None where not known."""

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
        """Equal keys, equal scores: of the network, its weights and the code that runs it."""
        return fingerprint.of([self.sha256, __version__])[:16]


def listed(text: str) -> dict[str, str]:
    """`A,NAME=B` to addresses by name, which is the address itself without one; raises `UserError`."""
    found: dict[str, str] = {}
    for word in _words(text):
        match = re.fullmatch(r"([\w.+-]+)=(.+)", word)
        name, address = match.groups() if match else (word, word)
        if name in found:
            raise UserError(f"--models names {name!r} twice", f"call one of them otherwise: NAME={address}")
        found[name] = address
    if not found:
        raise UserError("--models is empty", "give some, such as distillmos,models:/NAME@champion")
    return found


def _words(text: str) -> list[str]:
    """What stands between commas, but for those inside of an ensemble."""
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
    """All models of `listed`, each loaded once; what was trained here is copied below `out`, where workers read it.

    `weights` are files by model name, or places of trained heads' encoders, `head` is for xlsr, `tracking` a folder of
    runs for addresses in MLflow where MLFLOW_TRACKING_URI is not set.
    Raises `UserError` that names all models which cannot be loaded, with the reasons.
    """
    if unknown := sorted(set(weights) - set(wanted)):
        raise UserError(f"--weights names {unknown}, which --models does not", f"choose from {list(wanted)}")
    if head and "xlsr" not in wanted.values():
        reason = f"--head {head} is for xlsr, which --models does not name; it has {list(wanted.values())}"
        raise UserError(reason, "leave it out, or add xlsr")
    found, failed = [], []
    uri = tracking_uri(tracking) if tracking and not os.environ.get("MLFLOW_TRACKING_URI") else None
    for name, address in wanted.items():
        try:
            if _is_trained(address):
                found.append(_trained(name, address, out, uri, weights.get(name)))
            else:
                found.append(_built_in(name, address, weights.get(name), head if address == "xlsr" else None))
        except UserError as error:
            failed.append(f"\n  {name}: {error}")
    if failed:
        reason = f"{len(failed)} of {len(wanted)} models cannot be loaded:{''.join(failed)}\n"
        raise UserError(reason, "correct these, or leave them out of --models")
    keys: dict[str, str] = {}
    for model in found:
        if (other := keys.setdefault(model.key, model.name)) != model.name:
            raise UserError(f"{other} and {model.name} are the same model", "give it once")
    return found


def _is_trained(address: str) -> bool:
    if address in teacher_names() or address.startswith(_ENSEMBLE):
        return False
    return "/" in address or os.path.isdir(address)  # noqa: PTH112


def _trained(name: str, address: str, out: str, uri: str | None, encoder: str | None) -> Candidate:
    """What was trained here: a student, or a head above the speech encoder at `encoder`, or a pruned teacher."""
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
    # On the CPU: only its name, hash and size are wanted here, and it must not hold a GPU.
    teacher = load_teacher(address, TeacherOptions(weights=weights, head=head, device="cpu"))
    if teacher.intrusive:
        raise UserError(f"{address} compares with clean originals, which the clips have not", "leave it out")
    series = {"distillmos": DISTILLED, "xlsr": TEACHER}.get(address, BASELINE)
    return Candidate(name, address, address, weights, head, teacher.weights_hash, _parameters(teacher), series, {})


def _parameters(teacher: Teacher, pruned: bool = False) -> int | None:
    """All that a model needs to score, of a pruned one those that are not zero; what the paper prints if it is not
    torch's.
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
    if "init" in provenance:  # fine-tuned from another one
        return _series(provenance["init"])
    return LABELED_ONLY if "shards" in provenance else UNKNOWN
