"""The code that MLflow stores with a student, so that it loads where this package is not installed."""

import shutil
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]

ENTRY = _PACKAGE / "mlflow_model.py"
"""The file that MLflow runs to make the model."""

CODE = (
    "__init__.py",
    "audio.py",
    "audio_decoders.py",
    "audio_files.py",
    "scorer.py",
    "student_files.py",
    "students/__init__.py",
    "students/conv_transformer.py",
    "table.py",
    "tar_files.py",
    "teachers/__init__.py",
    "trained.py",
)
"""The part of this package that a student needs."""

ENCODER_CODE = ("encoder_scorer.py", "labels.py", "slim_encoder.py", "speech_encoder.py")
"""What a head above a speech encoder needs beside."""

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
"""What a student's code imports from elsewhere."""

ENCODER_REQUIREMENTS = ("transformers>=5,<6",)


def stage(folder: str, with_encoder: bool) -> str:
    """Copy the needed part of this package below a local folder; returns the path of the copy."""
    package = Path(folder, _PACKAGE.name)
    for name in (*CODE, *(ENCODER_CODE if with_encoder else ())):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_PACKAGE / name, package / name)
    return str(package)
