"""What teachers share whose network is one file of torch's, as others have released it, and hears waves whole."""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speechdistill.io import weights_file
from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.io.errors import UserError
from speechdistill.models.device import on_device, torch_device
from speechdistill.models.label import logits
from speechdistill.models.networks.conv_transformer import SEGMENT_SAMPLES
from speechdistill.models.windowed import HOP_S, Windowed, check, segment_starts

_BATCH_SEGMENTS = {"cpu": 1, "cuda": 8}


class Released(Windowed):
    """A network that judges a wave whole, or above `whole_s` in windows of 7.68 s at most `hop_s` apart.

    Waves of one length make a batch, `batch_s` in windows of 7.68 s. A teacher gives the constants below, `_place`,
    `_network` and `_mos`. Its `weights` is the path or URL of a file like the released one (default: `_place`); nothing
    is downloaded that was not asked for. Raises `WeightsError` if the weights are missing, and `UserError` for
    wrong ones or a wrong device, batch or hop, or another dtype than float32.
    """

    model: str
    """What it is called in errors."""
    url: str
    terms: str
    """Size and licence of the released file."""
    whole_s: float

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
            raise UserError(f"dtype {dtype!r}", f"teacher {self.name!r} is float32")
        self._segment = SEGMENT_SAMPLES
        self._hop = max(1, round(hop_s * SAMPLE_RATE))
        self._device = torch_device(device)
        at_once = batch_s * SAMPLE_RATE / SEGMENT_SAMPLES if batch_s else _BATCH_SEGMENTS.get(self._device.type, 1)
        self._batch = max(1, int(at_once + 1e-6))
        path = weights or self._place()
        ask = f"give {self.url} ({self.terms}), or the path of that file"
        data, self.weights_hash = weights_file.read(path, f"no weights of {self.model} there", ask)
        with weights_file.fitting(path, f"{self.model}'s weights"):
            network = self._network(weights_file.state(data))
        self.network = network.to(self._device).eval()

    def _place(self) -> str:
        """Where its usual tools keep the released file."""
        raise NotImplementedError

    def _network(self, saved: Any) -> torch.nn.Module:
        """The network of what is in the file."""
        raise NotImplementedError

    def _mos(self, waves: Tensor) -> Tensor:
        """(batch, num_samples) on the device to scores (batch,)."""
        raise NotImplementedError

    def _starts(self, wave: np.ndarray) -> list[int]:
        return [0] if self._is_whole(wave) else segment_starts(len(wave), self._hop)

    def _window(self, wave: np.ndarray, start: int) -> np.ndarray:
        return wave if self._is_whole(wave) else super()._window(wave, start)

    def _is_whole(self, wave: np.ndarray) -> bool:
        return len(wave) <= self.whole_s * SAMPLE_RATE

    def _forward(self, windows: Sequence[np.ndarray]) -> Tensor:
        scores: list[Tensor] = []
        with torch.inference_mode():
            for _, alike in groupby(windows, len):  # it would hear padding
                batch = np.stack(list(alike)).astype(np.float32)
                scores.append(self._mos(on_device(batch, self._device)))
        return torch.from_numpy(logits(torch.cat(scores).cpu().numpy()))
