"""TorchAudio-SQUIM's objective model (Kumar et al. 2023): PESQ without the clean original, 7.4 M parameters.

The network is one file of torchaudio, which is not imported: its library does not load beside every build of torch.
"""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechdistill.io.errors import LibraryError
from speechdistill.models.label import problem
from speechdistill.models.released import Released

_PESQ = 1  # of what the network says: STOI, PESQ, SI-SDR
_FILE = Path("models") / "squim" / "objective.py"
_MISSING = (
    "teacher squim lacks torchaudio",
    "install the build of it that loads beside this torch (`pip install 'speechdistill[torchaudio]'` brings the one "
    "for CUDA; BSD)",
)


class Teacher(Released):
    """The score is the estimated PESQ wideband (MOS-LQO of P.862.2, 1 to 4.64) as it stands, not a listener's MOS.

    It is that of torchaudio's pipeline SQUIM_OBJECTIVE for waves of up to 15 s; longer ones are judged without their
    silent windows. How waves are judged, and what else is raised, is `Released`'s; raises `LibraryError` where
    torchaudio is not installed.
    """

    name = "squim"
    model = "SQUIM"
    url = "https://download.pytorch.org/torchaudio/models/squim_objective_dns2020.pth"
    terms = "29.6 MB, CC BY 4.0"
    whole_s = 15.0  # memory grows with the square of the length, to 1.1 GB here

    def __init__(self, weights: str | None = None, *args: Any, **options: Any) -> None:
        self._objective: torch.nn.Module = _network()  # before the weights are fetched
        super().__init__(weights, *args, **options)

    def _place(self) -> str:
        return str(Path(torch.hub.get_dir()) / "torchaudio" / "models" / "squim_objective_dns2020.pth")

    def _network(self, saved: Any) -> torch.nn.Module:
        self._objective.load_state_dict(saved)
        return self._objective

    def _mos(self, waves: Tensor) -> Tensor:
        pesq: Tensor = self.network(waves)[_PESQ]
        return pesq

    def _starts(self, wave: np.ndarray) -> list[int]:
        starts = super()._starts(wave)
        if self._is_whole(wave):
            return starts
        return [start for start in starts if problem(self._window(wave, start)) is None]  # it divides by the level


def _network() -> Any:
    """torchaudio's `squim_objective_base`, from its file."""
    package = importlib.util.find_spec("torchaudio")  # finds the package without importing it
    file = Path(package.origin).parent / _FILE if package and package.origin else None
    spec = importlib.util.spec_from_file_location("squim_objective", file) if file and file.is_file() else None
    if spec is None or spec.loader is None:
        raise LibraryError(*_MISSING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.squim_objective_base()
