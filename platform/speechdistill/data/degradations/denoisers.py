"""Denoisers: spectral gating and three trained networks, for the distortion that they leave."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from speechdistill.data import onnx_denoisers
from speechdistill.data.degradation import Component, Neural, Scene
from speechdistill.io import audio
from speechdistill.io.assets import Need
from speechdistill.io.errors import LibraryError

if TYPE_CHECKING:
    import torch

_WINDOW, _HOP = 1024, 256  # TorchGate's defaults
_GATE = {"sr": audio.SAMPLE_RATE, "n_fft": _WINDOW, "hop_length": _HOP}
_MOVING_MEAN = 21  # frames; the default of TorchGate, 20, has no middle


@dataclass(frozen=True)
class SpectralGating:
    """Spectral gating by TorchGate of noisereduce, with statistics of the wave itself.

    The threshold of a frequency is fixed (`stationary`) or follows a moving mean. Bins below the threshold are scaled
    by 1 - `strength`.
    """

    stationary: bool
    strength: float

    def apply(self, wave: np.ndarray) -> np.ndarray:
        import torch

        # TorchGate refuses less than two windows, and its inverse transform drops an incomplete hop.
        length = max(2 * _WINDOW, -(-len(wave) // _HOP) * _HOP)
        padded = torch.from_numpy(audio.fit(wave, length).astype(np.float32))
        gated: np.ndarray = _gate_class()(self.stationary, self.strength)(padded[None])[0].numpy()
        return gated[: len(wave)]

    def clip_ids(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class NSNet2(Neural):
    """Baseline of the DNS challenge: gains per frequency from log powers (Braun and Tashev, arXiv 2008.06412)."""

    need: ClassVar[Need] = Need(
        "nsnet2",
        "the ONNX file of NSNet2, nsnet2-20ms-baseline.onnx",
        "https://github.com/microsoft/DNS-Challenge/raw/master/NSNet2-baseline/nsnet2-20ms-baseline.onnx",
        "the repository's: MIT for code, CC BY 4.0 for other content",
    )

    @classmethod
    def load(cls, path: Path, device: str) -> Any:
        session = onnx_denoisers.session(path.read_bytes(), device)
        onnx_denoisers.gained(session, np.zeros((1, 1), np.float32))  # fails here for a graph of another shape
        return session

    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        if network.get_inputs()[0].shape[0] == 1:
            return np.concatenate([onnx_denoisers.gained(network, wave[None]) for wave in waves])
        return onnx_denoisers.gained(network, waves)


@dataclass(frozen=True)
class DeepFilterNet3(Neural):
    """Gains per ERB band, and below 4.8 kHz a filter over five frames, at 48 kHz (Schröter et al., arXiv 2305.08227).

    The attenuation is unlimited and the post-filter off, like in `enhance` of DeepFilterNet.
    """

    need: ClassVar[Need] = Need(
        "deepfilternet3",
        "the ONNX export of DeepFilterNet 3, DeepFilterNet3_onnx.tar.gz",
        "https://github.com/Rikorose/DeepFilterNet/raw/main/models/DeepFilterNet3_onnx.tar.gz",
        "MIT or Apache-2.0",
    )

    @classmethod
    def load(cls, path: Path, device: str) -> Any:
        network = onnx_denoisers.deep_filter(path, device)
        onnx_denoisers.deep_filtered(network, np.zeros(1, np.float32))  # fails here for graphs of other shapes
        return network

    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        # One by one: the exported graphs have a batch of one.
        return np.stack([onnx_denoisers.deep_filtered(network, wave) for wave in waves])


@dataclass(frozen=True)
class Demucs(Neural):
    """Causal Demucs on waveforms, dns64, trained on the DNS challenge (Défossez et al., arXiv 2006.12847)."""

    need: ClassVar[Need] = Need(
        "demucs",
        "the weights of Demucs for speech, dns64-a7761ff99a7d5bb6.th",
        "https://dl.fbaipublicfiles.com/adiyoss/denoiser/dns64-a7761ff99a7d5bb6.th",
        "CC BY-NC 4.0, also of the package `denoiser` that runs it",
    )

    @classmethod
    def load(cls, path: Path, device: str) -> Any:
        import torch

        network_class = _demucs()
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):  # drawing initial weights would change the global random state
            network = network_class(hidden=len(state["encoder.0.0.weight"]), sample_rate=audio.SAMPLE_RATE)
        network.load_state_dict(state, assign=True)
        return network.eval().requires_grad_(False).to(device)

    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        import torch

        length = waves.shape[1]
        # The network divides by the standard deviation, which a single sample lacks.
        padded = torch.from_numpy(np.pad(waves, ((0, 0), (0, max(0, 2 - length)))))
        denoised: torch.Tensor = network(padded.to(next(network.parameters()).device))
        return denoised[:, 0, :length].cpu().numpy()


def _draw_spectral_gating(rng: np.random.Generator, scene: Scene) -> SpectralGating:
    """Draw stationary or not with equal probability, and a strength uniform in 0.6..1."""
    return SpectralGating(bool(rng.random() < 0.5), float(rng.uniform(0.6, 1.0)))


def _draw_nsnet2(rng: np.random.Generator, scene: Scene) -> NSNet2:
    return NSNet2(*scene.assets[NSNet2.need.name])


def _draw_deepfilternet3(rng: np.random.Generator, scene: Scene) -> DeepFilterNet3:
    return DeepFilterNet3(*scene.assets[DeepFilterNet3.need.name])


def _draw_demucs(rng: np.random.Generator, scene: Scene) -> Demucs:
    return Demucs(*scene.assets[Demucs.need.name])


def _demucs() -> Any:
    """Import the class of the network; raises `LibraryError` if its package is missing."""
    try:
        from denoiser.demucs import Demucs
    except ImportError as error:
        raise LibraryError(
            "no Demucs for speech (CC BY-NC 4.0, not for commercial use)", "pip install --no-deps denoiser==0.1.5"
        ) from error
    return Demucs


spectral_gating = Component(_draw_spectral_gating, SpectralGating)
nsnet2 = Component(_draw_nsnet2, NSNet2, needs=(NSNet2.need,), libraries=("onnxruntime",))
deepfilternet3 = Component(
    _draw_deepfilternet3, DeepFilterNet3, needs=(DeepFilterNet3.need,), libraries=("onnxruntime",)
)
demucs = Component(_draw_demucs, Demucs, needs=(Demucs.need,), libraries=("denoiser",), check=_demucs)


@lru_cache(maxsize=1)
def _gate_class() -> "type[torch.nn.Module]":
    """Define `Gate(stationary, strength)`: TorchGate with convolutions of our own, otherwise two thirds of its time.

    These are the moving mean, and the smoothing of the mask over time and over frequency.
    """
    import torch
    from noisereduce.torchgate import TorchGate
    from noisereduce.torchgate.utils import temperature_sigmoid

    class Gate(TorchGate):  # type: ignore[misc]
        def __init__(self, stationary: bool, strength: float) -> None:
            own_smoothing = {"freq_mask_smooth_hz": None, "time_mask_smooth_ms": None}
            super().__init__(**_GATE, nonstationary=not stationary, **own_smoothing)
            self.strength = strength

        def _stationary_mask(self, X_db: torch.Tensor, xn: torch.Tensor | None = None) -> torch.Tensor:
            return self._smoothed(super()._stationary_mask(X_db, xn))

        def _nonstationary_mask(self, X_abs: torch.Tensor) -> torch.Tensor:
            # 0/0 in digital silence would be NaN, which the smoothing of the mask would spread to bins with signal.
            # 1e-20 is far below a 16-bit step; the gate closes.
            magnitudes = X_abs + 1e-20
            mean = _convolved(magnitudes, [1 / _MOVING_MEAN] * _MOVING_MEAN, 2)
            excess = magnitudes / mean - 1
            mask = temperature_sigmoid(excess, self.n_thresh_nonstationary, self.temp_coeff_nonstationary)
            return self._smoothed(mask)

        def _smoothed(self, mask: torch.Tensor) -> torch.Tensor:
            lowered = 1 - self.strength * (1 - mask.float())
            return _convolved(_convolved(lowered, over_time, 2), over_frequency, 1)

    kernel = TorchGate(**_GATE).smoothing_filter[0, 0]  # separable, of sum 1
    over_frequency, over_time = (kernel.sum(dim).tolist() for dim in (1, 0))
    return Gate


def _convolved(spectrum: "torch.Tensor", taps: list[float], dim: int) -> "torch.Tensor":
    """Convolve with an odd number of taps along one axis; `conv2d` would compile anew for each length of wave."""
    import torch

    size, reach = spectrum.shape[dim], len(taps) // 2
    convolved = torch.zeros_like(spectrum)
    for shift, tap in zip(range(-reach, reach + 1), taps, strict=True):
        if overlap := max(0, size - abs(shift)):
            moved = spectrum.narrow(dim, max(0, shift), overlap)
            convolved.narrow(dim, max(0, -shift), overlap).add_(moved, alpha=tap)
    return convolved
