"""Search path of modules without the user's current folder, whose files are not part of the program."""

import os
import sysconfig
from collections.abc import Iterable
from pathlib import Path

_ALWAYS = {Path(__file__).parents[2].resolve(), *(Path(path).resolve() for path in sysconfig.get_paths().values())}
"""Folders of this package, of Python and its libraries: they stay in the path even if one is the current folder."""


def without_current_folder(paths: Iterable[str]) -> list[str]:
    """Return the entries of `sys.path` or PYTHONPATH that are not the current folder, which "" means as well."""
    kept = [(path, Path(path).resolve()) for path in paths if path]
    return [path for path, folder in kept if folder != Path.cwd().resolve() or folder in _ALWAYS]


def in_environment() -> list[str]:
    """Return the entries of PYTHONPATH that are not the current folder."""
    return without_current_folder(os.environ.get("PYTHONPATH", "").split(os.pathsep))
