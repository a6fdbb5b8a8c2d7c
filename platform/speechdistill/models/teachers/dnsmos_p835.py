"""DNSMOS P.835 (Reddy, Gopal and Cutler 2022): its overall MOS, OVRL."""

import numpy as np

from speechdistill.models.dnsmos import Dnsmos

_OVRL = (-0.06766283, 1.11546468, 0.04602535)  # of the wheel: from the network's scale to the listeners'


class Teacher(Dnsmos):
    """The overall quality of noise-suppressed speech, as the `ovrl_mos` of the wheel; see `Dnsmos`."""

    name = "dnsmos_p835"
    file = "dnsmos_models/sig_bak_ovr.onnx"

    def _scores(self, windows: np.ndarray) -> np.ndarray:
        return np.polyval(_OVRL, self._run(windows)[:, 2].astype(np.float64))
