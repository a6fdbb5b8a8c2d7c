"""The search path of modules: not the user's current folder, whose files are no part of the program."""

import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path

_ALWAYS = {Path(__file__).parents[2].resolve(), *(Path(path).resolve() for path in sysconfig.get_paths().values())}
"""Folders of the program, which stay where they are the current one: of this package, of Python and its libraries."""


def without_current_folder(paths: Iterable[str]) -> list[str]:
    """The entries of `sys.path` or PYTHONPATH that are not the current folder; an empty one means it, too."""
    kept = [(path, Path(path).resolve()) for path in paths if path]
    return [path for path, folder in kept if folder != Path.cwd().resolve() or folder in _ALWAYS]


def in_environment() -> list[str]:
    """The entries of PYTHONPATH that are not the current folder."""
    return without_current_folder(os.environ.get("PYTHONPATH", "").split(os.pathsep))
