"""The file that a teacher's weights are in, perhaps of an installed package that is not imported."""

import hashlib
import importlib.util
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from speechdistill.io import storage
from speechdistill.io.errors import UserError, WeightsError

_BROKEN = (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, IndexError, TypeError, AttributeError)
"""What reading a file that is another gives."""


def of_package(package: str, file: str) -> str:
    """Where a package has a file; a path that is not there where it is not installed."""
    spec = importlib.util.find_spec(package)  # finds the package without importing it
    folder = Path(spec.origin).parent if spec and spec.origin else Path(package)
    return str(folder / file)


def read(path: str, missing: str, fix: str) -> tuple[bytes, str]:
    """The bytes of a path or URL, and their sha256; if it is not there, `WeightsError` says `missing` of it."""
    try:
        with storage.access(path, FileNotFoundError), storage.opened(path) as file:
            data = bytes(file.read())
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: {missing}", fix) from error
    return data, hashlib.sha256(data).hexdigest()


@contextmanager
def fitting(path: str, what: str) -> Iterator[None]:
    """Within it a file's contents become a network; `UserError` if they are not `what`."""
    try:
        yield
    except _BROKEN as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise UserError(f"{path}: not {what} ({reason})", "give such a file, or fetch it again") from error
