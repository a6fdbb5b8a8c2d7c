"""What the DNSMOS teachers share: windows of 9.01 s, ONNX networks of Microsoft's `speechmos` wheel (MIT), their MOS.

The wheel is not imported: it needs librosa. Scores equal those of its version 0.0.1.1.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechdistill.io import weights_file
from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.io.errors import UserError
from speechdistill.models.device import torch_device
from speechdistill.models.label import logits
from speechdistill.models.windowed import HOP_S, Windowed, check

WINDOW_S = 9.01
SEGMENT_SAMPLES = 144_160

_BATCH_SEGMENTS = 4
_MISSING = "no such ONNX file", "`pip install --no-deps speechmos==0.0.1.1` (9 MB, MIT) brings it, or give its path"


class Dnsmos(Windowed):
    """A network that judges 9.01 s; a teacher gives `name`, `file` and `_scores`.

    A shorter wave is repeated, and judged in all windows of what doubling makes of it, as in the wheel. Raises
    `WeightsError` if the file is missing, `ImportError` if onnxruntime is, and `UserError` for a wrong
    file, device, batch or hop, or another dtype than float32.
    """

    name: str
    file: str
    """Where its network is in the wheel."""

    def __init__(
        self,
        weights: str | None = None,
        device: str | None = None,
        dtype: str = "float32",
        batch_s: float | None = None,
        hop_s: float = HOP_S,
    ) -> None:
        check(dtype, batch_s, hop_s, WINDOW_S)
        if dtype != "float32":
            raise UserError(f"dtype {dtype!r}", f"teacher {self.name!r} is float32")
        self._segment = SEGMENT_SAMPLES
        self._batch = max(1, int(batch_s / WINDOW_S + 1e-6)) if batch_s else _BATCH_SEGMENTS
        self._hop_s = max(1, int(hop_s))  # windows start at whole seconds
        path = weights or weights_file.of_package("speechmos", self.file)
        data, self.weights_hash = weights_file.read(path, *_MISSING)
        self._session = _session(data, path, torch_device(device).type)

    def _starts(self, wave: np.ndarray) -> list[int]:
        num_samples = len(wave)
        while num_samples < SEGMENT_SAMPLES:
            num_samples *= 2
        seconds = range(0, int(num_samples // SAMPLE_RATE - WINDOW_S) + 1, self._hop_s)
        # With a hop of 1 s the wheel leaves out the windows whose end it rounds down, at 7 to 23 s and above 119 s.
        heard = [
            s
            for s in seconds
            if self._hop_s > 1 or int((s + WINDOW_S) * SAMPLE_RATE) == s * SAMPLE_RATE + self._segment
        ]
        return [s * SAMPLE_RATE for s in heard]

    def _window(self, wave: np.ndarray, start: int) -> np.ndarray:
        if len(wave) >= SEGMENT_SAMPLES:
            return super()._window(wave, start)
        return wave.take(range(start, start + SEGMENT_SAMPLES), mode="wrap")

    def _forward(self, windows: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(logits(self._scores(np.stack(windows).astype(np.float32))))

    def _scores(self, windows: np.ndarray) -> np.ndarray:
        """MOS of windows, (batch, 144160) to (batch,)."""
        raise NotImplementedError

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        """(batch, ...) float32 through the network."""
        return np.asarray(self._session.run(None, {self._session.get_inputs()[0].name: inputs})[0])


def _session(data: bytes, path: str, device: str) -> Any:
    import onnxruntime
    import torch

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # 1 in the actors of a job
    options.inter_op_num_threads = 1
    wanted = ["CUDAExecutionProvider"] if device == "cuda" else []
    available = onnxruntime.get_available_providers()  # onnxruntime-gpu has CUDA, onnxruntime has not
    providers = [name for name in (*wanted, "CPUExecutionProvider") if name in available]
    try:
        return onnxruntime.InferenceSession(data, options, providers=providers)
    except Exception as error:  # onnxruntime's own kinds, which it does not export
        raise UserError(
            f"{path}: not an ONNX network ({str(error).splitlines()[0]})", "fetch the file again"
        ) from error
