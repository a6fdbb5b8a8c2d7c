"""DNSMOS P.835 (Reddy, Gopal and Cutler 2022): its overall MOS, OVRL."""

import numpy as np

from speechdistill.models import dnsmos
from speechdistill.models.dnsmos import Run
from speechdistill.models.options import TeacherOptions
from speechdistill.models.windowed import WindowScorer

FILE = "dnsmos_models/sig_bak_ovr.onnx"
_OVRL = (-0.06766283, 1.11546468, 0.04602535)  # of the wheel: from the network's scale to the listeners'
_DEFAULTS = TeacherOptions()


def load(options: TeacherOptions = _DEFAULTS) -> WindowScorer:
    """Load the overall quality of noise-suppressed speech, the wheel's `ovrl_mos`; see `dnsmos.scorer`."""
    return dnsmos.scorer("dnsmos_p835", FILE, _scores, options)


def _scores(run: Run, windows: np.ndarray) -> np.ndarray:
    return np.polyval(_OVRL, run(windows)[:, 2].astype(np.float64))
