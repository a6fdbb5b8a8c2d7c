"""Files of teachers' weights, some of them in installed packages that are not imported."""

import hashlib
import importlib.util
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from speechdistill.io import storage
from speechdistill.io.errors import UserError, WeightsError

_BROKEN = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, IndexError)
"""Exceptions raised for a file that is not the expected checkpoint. A TypeError is a fault of the program."""


def of_package(package: str, file: str) -> str:
    """Return the path of a package's file; a path that does not exist if the package is not installed."""
    spec = importlib.util.find_spec(package)  # finds the package without importing it
    folder = Path(spec.origin).parent if spec and spec.origin else Path(package)
    return str(folder / file)


def read(path: str, missing: str, fix: str) -> tuple[bytes, str]:
    """Return the bytes of a path or URL, and their sha256; raises `WeightsError` (`missing`) if it does not exist."""
    try:
        with storage.access(path, FileNotFoundError), storage.opened(path) as file:
            data = bytes(file.read())
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: {missing}", fix) from error
    return data, hashlib.sha256(data).hexdigest()


def state(data: bytes, *keys: str) -> dict[str, Any]:
    """Return the dictionary that `torch.save` wrote, or the one below `keys` in it.

    Raises what `fitting` reports, also for a value that is not a dictionary.
    """
    import torch

    value: Any = torch.load(BytesIO(data), map_location="cpu", weights_only=True)
    for key in (None, *keys):
        value = value if key is None else value[key]
        if not isinstance(value, dict):
            raise pickle.UnpicklingError(f"{key or 'the file'} is a {type(value).__name__}, not a dictionary")
    return dict(value)


@contextmanager
def fitting(path: str, what: str) -> Iterator[None]:
    """Raise `UserError` if the body fails because the contents of the file at `path` are not `what`."""
    try:
        yield
    except _BROKEN as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"{path}: not {what} ({reason})", "give such a file, or fetch it again") from error
