"""TorchAudio-SQUIM's objective model (Kumar et al. 2023): PESQ without the clean original, 7.4 M parameters.

The network is one file of torchaudio, which is not imported: its library does not load with every build of torch.
"""

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.io.errors import LibraryError
from speechdistill.models import released
from speechdistill.models.options import TeacherOptions
from speechdistill.models.released import Release
from speechdistill.models.windowed import EvenWindows, WindowScorer

_PESQ = 1  # of the outputs: STOI, PESQ, SI-SDR
_WHOLE_S = 15  # memory grows with the square of the length, to 1.1 GB here
_FILE = Path("models") / "squim" / "objective.py"
_MISSING = (
    "teacher squim lacks torchaudio",
    "install the build that loads with this torch (`pip install 'speechdistill[torchaudio]'` brings the one "
    "for CUDA; BSD)",
)


_DEFAULTS = TeacherOptions()


def _place() -> str:
    return str(Path(torch.hub.get_dir()) / "torchaudio" / "models" / "squim_objective_dns2020.pth")


_RELEASE = Release(
    teacher="squim",
    model="SQUIM",
    url="https://download.pytorch.org/torchaudio/models/squim_objective_dns2020.pth",
    terms="29.6 MB, CC BY 4.0",
    place=_place,
)


def load(options: TeacherOptions = _DEFAULTS) -> WindowScorer:
    """Load the estimate of PESQ wideband (MOS-LQO of P.862.2, 1 to 4.64), unchanged: it is not a listener's MOS.

    Waves of up to 15 s score as in torchaudio's pipeline SQUIM_OBJECTIVE. Longer waves are scored in windows of 7.68 s,
    without the silent ones: the network divides by the level. Raises `LibraryError` if torchaudio is not installed, and
    the errors of `released.scorer`.
    """
    windows = EvenWindows(hop=options.hop(), whole=_WHOLE_S * SAMPLE_RATE, sounding=True)
    network = _network()  # before the weights are fetched

    def build(saved: Any) -> torch.nn.Module:
        network.load_state_dict(saved)
        return network

    return released.scorer(_RELEASE, options, windows, build, _pesq)


def _pesq(outputs: list[Tensor]) -> Tensor:
    return outputs[_PESQ]


def _network() -> torch.nn.Module:
    """Build torchaudio's `squim_objective_base` from its source file."""
    package = importlib.util.find_spec("torchaudio")  # finds the package without importing it
    file = Path(package.origin).parent / _FILE if package and package.origin else None
    spec = importlib.util.spec_from_file_location("squim_objective", file) if file and file.is_file() else None
    if spec is None or spec.loader is None:
        raise LibraryError(*_MISSING)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    network: torch.nn.Module = module.squim_objective_base()
    return network
