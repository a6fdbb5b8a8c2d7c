"""Teachers that load a third-party PyTorch checkpoint and score each recording in one pass."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from speechdistill.io import weights_file
from speechdistill.io.audio import SEGMENT_S
from speechdistill.models.device import on_device, torch_device
from speechdistill.models.label import logits
from speechdistill.models.options import TeacherOptions
from speechdistill.models.windowed import Windows, WindowScorer

_BATCH_SEGMENTS = {"cpu": 1, "cuda": 8}


@dataclass(frozen=True, kw_only=True)
class Release:
    """A released checkpoint: the teacher's name, the model's name in errors, the file's URL, its size and licence.

    `place` returns where the model's usual tools keep the file.
    """

    teacher: str
    model: str
    url: str
    terms: str
    place: Callable[[], str]


def scorer(
    release: Release,
    options: TeacherOptions,
    windows: Windows,
    build: Callable[[Any], nn.Module],
    mos: Callable[[Any], Tensor],
) -> WindowScorer:
    """Load a teacher: `build` makes the network of the loaded file, `mos` takes scores (batch,) from its output.

    The weights are the path or URL of a file like the released one (default: `release.place`); nothing is downloaded
    without being asked for. Waves of one length make a batch, measured in windows of 7.68 s. Raises `WeightsError` if
    the weights are missing, and `UserError` for wrong weights, a wrong device, or another dtype than float32.
    """
    options.only(release.teacher)
    options.float32_only(release.teacher)
    device = torch_device(options.device)
    path = options.weights or release.place()
    ask = f"give {release.url} ({release.terms}), or the path of that file"
    data, digest = weights_file.read(path, f"no weights of {release.model} there", ask)
    with weights_file.fitting(path, f"{release.model}'s weights"):
        network = build(weights_file.state(data))
    batch = options.batch(_BATCH_SEGMENTS.get(device.type, 1) * SEGMENT_S)
    return WindowScorer(release.teacher, digest, windows, batch, MosForward(network.to(device).eval(), device, mos))


class MosForward:
    """A network that gives MOS, as a function of windows; those of one length go through together, without padding."""

    def __init__(self, network: nn.Module, device: torch.device, mos: Callable[[Any], Tensor]) -> None:
        self.network = network
        self._device, self._mos = device, mos

    def __call__(self, windows: Sequence[np.ndarray]) -> Tensor:
        scores: list[Tensor] = []
        with torch.inference_mode():
            for _, alike in groupby(windows, len):
                batch = np.stack(list(alike)).astype(np.float32)
                scores.append(self._mos(self.network(on_device(batch, self._device))))
        return torch.from_numpy(logits(torch.cat(scores).cpu().numpy()))
