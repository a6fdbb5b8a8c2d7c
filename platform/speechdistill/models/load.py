"""Teachers by name or address.

A new teacher is one file in `teachers/` with a function `load(options) -> Teacher`; `load_teacher` finds it by name.
"""

import importlib
import pkgutil
from dataclasses import replace
from pathlib import Path

from speechdistill.io.errors import UserError
from speechdistill.models import teachers
from speechdistill.models.ensemble import PREFIX, Ensemble
from speechdistill.models.label import Teacher
from speechdistill.models.options import TeacherOptions

_STUDENT = "student"
_DEFAULTS = TeacherOptions()


def load_teacher(name: str, options: TeacherOptions = _DEFAULTS) -> Teacher:
    """Load the teacher called `name`, or the model at that address.

    An address is a checkpoint's folder, a URL, or `models:/NAME@champion`, `models:/NAME/3` or `runs:/ID/student` at
    MLFLOW_TRACKING_URI. `ensemble:NAME=0.7,NAME=0.3` is the weighted mean of teachers with their released weights, or
    of models at addresses. Raises `UserError` listing the names for an unknown name, and for options that the teacher
    lacks; `WeightsError` if weights are missing.
    """
    if name.startswith(PREFIX):
        return _ensemble(name, options)
    if name in teacher_names():
        teacher: Teacher = importlib.import_module(f"{teachers.__name__}.{name}").load(options)
        return teacher
    if name == _STUDENT:
        if options.weights is None:
            raise UserError("teacher 'student' has no released weights", "give a checkpoint's folder as its weights")
        name, options = options.weights, replace(options, weights=None)
    elif not ("/" in name or Path(name).is_dir()):
        raise UserError(
            f"teacher {name!r} is unknown",
            f"choose from {teacher_names()}, or give a student: the folder of its checkpoint or "
            "models:/NAME@champion; or an ensemble: ensemble:distillmos=0.7,dnsmos_p808=0.3",
        )
    return _trained(name, options)


def teacher_names() -> list[str]:
    """List the teachers that have a name."""
    return sorted(module.name for module in pkgutil.iter_modules(teachers.__path__))


def _ensemble(name: str, options: TeacherOptions) -> Ensemble:
    if options.weights:
        raise UserError(
            f"teacher {name!r} takes no weights", "members have their released weights, or are given by address"
        )
    options.only("ensemble")
    return Ensemble(name.removeprefix(PREFIX), lambda member: load_teacher(member, options))


def _trained(address: str, options: TeacherOptions) -> Teacher:
    # Not an import statement: MLflow stores the code that those reach with a model, which needs no tracking.
    teacher: Teacher = importlib.import_module("speechdistill.models.trained").load(address, options)
    return teacher
