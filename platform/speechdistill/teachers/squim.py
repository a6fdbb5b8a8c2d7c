"""TorchAudio-SQUIM's objective model (Kumar et al. 2023): PESQ without the clean original, 7.4 M parameters.

The network is one file of torchaudio, which is not imported: its library does not load beside every build of torch.
"""

import hashlib
import importlib.util
import pickle
from collections.abc import Sequence
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch

from speechdistill.audio import SAMPLE_RATE
from speechdistill.scorer import HOP_S, Windowed, check, segment_starts, torch_device
from speechdistill.students.conv_transformer import SEGMENT_SAMPLES
from speechdistill.teachers import logits, problem

RELEASED = "https://download.pytorch.org/torchaudio/models/squim_objective_dns2020.pth"
"""Its weights (29.6 MB, CC BY 4.0), which torchaudio keeps in torch's cache."""
WHOLE_S = 15.0
"""Longer waves are judged in windows: memory grows with the square of the length, to 1.1 GB here."""

_PESQ = 1  # of what the network says: STOI, PESQ, SI-SDR
_BATCH_SEGMENTS = {"cpu": 1, "cuda": 8}
_NETWORK = Path("models") / "squim" / "objective.py"
_NO_NETWORK = (
    "teacher squim lacks torchaudio; install the build of it that loads beside this torch (`pip install "
    "'speechdistill[torchaudio]'` brings the one for CUDA; BSD)"
)
_NO_WEIGHTS = f"{{}}: no weights of SQUIM there; give {RELEASED} (29.6 MB, CC BY 4.0), or the path of that file"


class Teacher(Windowed):
    """The score is the estimated PESQ wideband (MOS-LQO of P.862.2, 1 to 4.64) as it stands, not a listener's MOS.

    It is that of torchaudio's pipeline SQUIM_OBJECTIVE for waves of up to 15 s, in windows of 7.68 s at most `hop_s`
    apart above, without the silent ones. Waves of one length make a batch, `batch_s` in windows of 7.68 s.

    `weights` is the path or URL of a file like the released one (default: the one in torch's cache). Raises
    `ImportError` where torchaudio is not installed, `FileNotFoundError` where the weights are missing, and `ValueError`
    for wrong ones or a wrong device, batch or hop, or another dtype than float32.
    """

    name = "squim"

    def __init__(
        self,
        weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
        hop_s: float = HOP_S,
    ) -> None:
        check(dtype, batch_s, hop_s)
        if dtype != "float32":
            raise ValueError(f"dtype {dtype!r}; teacher {self.name!r} is float32")
        self._segment = SEGMENT_SAMPLES
        self._hop = max(1, round(hop_s * SAMPLE_RATE))
        self._device = torch_device(device)
        at_once = batch_s * SAMPLE_RATE / SEGMENT_SAMPLES if batch_s else _BATCH_SEGMENTS.get(self._device.type, 1)
        self._batch = max(1, int(at_once + 1e-6))
        network = _network()
        path = weights or str(Path(torch.hub.get_dir()) / "torchaudio" / "models" / "squim_objective_dns2020.pth")
        data = _read(path)
        self.weights_hash = hashlib.sha256(data).hexdigest()
        try:
            network.load_state_dict(torch.load(BytesIO(data), map_location="cpu", weights_only=True))
        except (RuntimeError, pickle.UnpicklingError, EOFError, KeyError, TypeError, AttributeError) as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
            raise ValueError(f"{path}: not SQUIM's weights ({reason})") from error
        self.network = network.to(self._device).eval()

    def _starts(self, wave: np.ndarray) -> list[int]:
        if _is_whole(wave):
            return [0]
        starts = segment_starts(len(wave), self._hop)
        return [start for start in starts if problem(self._window(wave, start)) is None]  # it divides by the level

    def _window(self, wave: np.ndarray, start: int) -> np.ndarray:
        return wave if _is_whole(wave) else super()._window(wave, start)

    def _forward(self, windows: Sequence[np.ndarray]) -> np.ndarray:
        scores: list[np.ndarray] = []
        with torch.inference_mode():
            for _, alike in groupby(windows, len):  # it would hear padding
                batch = torch.from_numpy(np.stack(list(alike)).astype(np.float32))
                scores.append(self.network(batch.to(self._device))[_PESQ].cpu().numpy())
        return logits(np.concatenate(scores))


def _network() -> Any:
    """torchaudio's `squim_objective_base`, from its file."""
    package = importlib.util.find_spec("torchaudio")  # finds the package without importing it
    file = Path(package.origin).parent / _NETWORK if package and package.origin else None
    spec = importlib.util.spec_from_file_location("squim_objective", file) if file and file.is_file() else None
    if spec is None or spec.loader is None:
        raise ImportError(_NO_NETWORK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.squim_objective_base()


def _read(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError as error:
        raise FileNotFoundError(_NO_WEIGHTS.format(path)) from error


def _is_whole(wave: np.ndarray) -> bool:
    return len(wave) <= WHOLE_S * SAMPLE_RATE
