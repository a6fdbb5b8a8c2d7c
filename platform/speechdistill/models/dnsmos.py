"""The DNSMOS teachers' common part: windows of 9.01 s, and ONNX networks of Microsoft's `speechmos` wheel (MIT).

The wheel is not imported, since it needs librosa. Scores equal those of its version 0.0.1.1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechdistill.io import weights_file
from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.io.errors import UserError
from speechdistill.models.device import torch_device
from speechdistill.models.label import logits
from speechdistill.models.options import TeacherOptions
from speechdistill.models.windowed import WindowScorer

WINDOW_S = 9.01
WINDOW_SAMPLES = 144_160

_BATCH_WINDOWS = 4
_MISSING = "no such ONNX file", "`pip install --no-deps speechmos==0.0.1.1` (9 MB, MIT) brings it, or give its path"

Run = Callable[[np.ndarray], np.ndarray]
"""A network: (batch, ...) float32 to its output."""

Scores = Callable[[Run, np.ndarray], np.ndarray]
"""The MOS (batch,) by a network of windows (batch, 144160)."""


def scorer(name: str, file: str, scores: Scores, options: TeacherOptions) -> WindowScorer:
    """Load a teacher whose network is `file` in the wheel, or the weights in `options`.

    Raises `WeightsError` if the file is missing, `ImportError` if onnxruntime is, and `UserError` for a wrong file,
    device or hop, or another dtype than float32.
    """
    options.only(name)
    windows = WholeSeconds.of(options)
    options.float32_only(name)
    path = options.weights or weights_file.of_package("speechmos", file)
    data, digest = weights_file.read(path, *_MISSING)
    forward = OnnxForward(_session(data, path, torch_device(options.device).type), scores)
    return WindowScorer(name, digest, windows, options.batch(_BATCH_WINDOWS * WINDOW_S, WINDOW_S), forward)


@dataclass(frozen=True)
class WholeSeconds:
    """Windows that start at whole seconds, `hop_s` apart.

    A wave shorter than a window is repeated, and scored in all windows of its repetitions by doubling, as in the wheel.
    """

    hop_s: int
    length: int = WINDOW_SAMPLES

    @classmethod
    def of(cls, options: TeacherOptions) -> "WholeSeconds":
        options.hop(WINDOW_S)  # refuses a longer one
        return cls(max(1, int(options.hop_s)))

    def starts(self, wave: np.ndarray) -> list[int]:
        num_samples = len(wave)
        while num_samples < self.length:
            num_samples *= 2
        seconds = range(0, int(num_samples // SAMPLE_RATE - WINDOW_S) + 1, self.hop_s)
        # With a hop of 1 s the wheel leaves out windows whose end it rounds down, at 7 to 23 s and above 119 s.
        return [s * SAMPLE_RATE for s in seconds if self.hop_s > 1 or _is_in_the_wheel(s)]

    def cut(self, wave: np.ndarray, start: int) -> np.ndarray:
        if len(wave) >= self.length:
            return wave[start : start + self.length]
        return wave.take(range(start, start + self.length), mode="wrap")


def _is_in_the_wheel(second: int) -> bool:
    return int((second + WINDOW_S) * SAMPLE_RATE) == second * SAMPLE_RATE + WINDOW_SAMPLES


class OnnxForward:
    """An ONNX network as a function of windows."""

    network = None

    def __init__(self, session: Any, scores: Scores) -> None:
        self._session, self._scores = session, scores

    def __call__(self, windows: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(logits(self._scores(self._run, np.stack(windows).astype(np.float32))))

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        return np.asarray(self._session.run(None, {self._session.get_inputs()[0].name: inputs})[0])


def _session(data: bytes, path: str, device: str) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # 1 in the actors of a job
    options.inter_op_num_threads = 1
    wanted = ["CUDAExecutionProvider"] if device == "cuda" else []
    available = onnxruntime.get_available_providers()  # CUDA in onnxruntime-gpu, not in onnxruntime
    providers = [name for name in (*wanted, "CPUExecutionProvider") if name in available]
    try:
        return onnxruntime.InferenceSession(data, options, providers=providers)
    except Exception as error:  # onnxruntime's own classes, which it does not export
        raise UserError(
            f"{path}: not an ONNX network ({str(error).splitlines()[0]})", "fetch the file again"
        ) from error
