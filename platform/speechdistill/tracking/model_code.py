"""Code that MLflow stores with a student, so that the student loads without this package."""

import ast
import shutil
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]

ENTRY = _PACKAGE / "models" / "served.py"
"""File that MLflow runs to make the model."""

_ENCODER = _PACKAGE / "models" / "encoder_scorer.py"
"""Imported only for a head above a speech encoder; not stored with a student."""

REQUIREMENTS = (
    "av>=18,<19",
    "fsspec>=2026.1,<2028",
    "mlflow>=3.17,<4",
    "numpy>=2,<3",
    "pandas>=2.2,<4",
    "pyarrow>=20,<30",
    "safetensors>=0.5,<1",
    "soundfile>=0.14,<1",
    "soxr>=1.1,<2",
    "torch>=2.11,<2.14",
)
"""Libraries that a student's code imports."""

ENCODER_REQUIREMENTS = ("transformers>=5,<6",)


def stage(folder: str, with_encoder: bool) -> str:
    """Copy the needed part of this package below a local folder; return the path of the copy."""
    package = Path(folder, _PACKAGE.name)
    for file in needed(with_encoder):
        copy = package / file.relative_to(_PACKAGE)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
    return str(package)


def needed(with_encoder: bool) -> set[Path]:
    """Return the files of this package that `ENTRY` imports, directly or through others."""
    reached, waiting = {ENTRY}, [ENTRY]
    while waiting:
        for file in _ours(waiting.pop()):
            if file not in reached and (with_encoder or file != _ENCODER):
                reached.add(file)
                waiting.append(file)
    return reached - {ENTRY}


def _ours(file: Path) -> Iterator[Path]:
    """Yield the files of this package that `file` imports, and the `__init__.py` files above them."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == _PACKAGE.name:
            for name in (str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)):
                path = _PACKAGE.joinpath(*name.split(".")[1:])
                packages = [path, *path.parents]
                packages = packages[: packages.index(_PACKAGE) + 1]
                candidates = [path.with_suffix(".py"), *(package / "__init__.py" for package in packages)]
                yield from (candidate for candidate in candidates if candidate.is_file())
