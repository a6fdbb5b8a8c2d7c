"""Distill-MOS v7, the released student, as a teacher: 4.1 M parameters, MOS of speech at 16 kHz.

The weights come from the `distillmos` wheel (MIT), which is not imported: it needs torchaudio for its command
line only. Scores equal that package's, with memory that does not grow with the length of the audio.
"""

import hashlib
import importlib.util
import pickle
from io import BytesIO
from pathlib import Path

import fsspec
import torch

from speechdistill.scorer import HOP_S, Scorer
from speechdistill.students.conv_transformer import ConvTransformer

_MISSING = "{}: no such weights file; `pip install --no-deps distillmos==0.9.1` brings it, or give its path"


class Teacher(Scorer):
    """The released model; its options are those of `Scorer`.

    `weights` is the path or URL of a file like the released one (default: from the installed wheel). Raises
    `FileNotFoundError` where there are no weights and `ValueError` for a wrong file, device, dtype, batch or hop.
    """

    def __init__(
        self,
        weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
        hop_s: float = HOP_S,
    ) -> None:
        path = weights or _released_weights()
        data = _read(path)
        digest = hashlib.sha256(data).hexdigest()
        super().__init__(_network(data, path), "distillmos", digest, device, dtype, batch_s, hop_s)


def _released_weights() -> str:
    spec = importlib.util.find_spec("distillmos")  # finds the package without importing it
    folder = Path(spec.origin).parent if spec and spec.origin else Path("distillmos")
    return str(folder / "weights" / "distill_mos_v7.pt")


def _read(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError as error:
        raise FileNotFoundError(_MISSING.format(path)) from error


def _network(data: bytes, path: str) -> ConvTransformer:
    network = ConvTransformer()
    try:
        network.load_state_dict(torch.load(BytesIO(data), map_location="cpu", weights_only=True)["model"])
    except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
        raise ValueError(f"{path}: not Distill-MOS v7 weights ({reason})") from error
    return network.eval()
