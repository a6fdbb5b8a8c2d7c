"""Denoisers without a network; the distortion they leave is part of the recipe."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from speechdistill import audio
from speechdistill.degradations import Scene

if TYPE_CHECKING:
    import torch

_WINDOW, _HOP = 1024, 256  # TorchGate's defaults
_MOVING_MEAN = 21  # frames; its default of 20 has no middle, and torch warns about it


@dataclass(frozen=True)
class SpectralGating:
    """Spectral gating as noisereduce's TorchGate does it, on the wave's own statistics.

    The threshold of a frequency is fixed (`stationary`) or follows a moving mean; what falls below it is
    lowered to 1 - `strength`.
    """

    stationary: bool
    strength: float

    def apply(self, wave: np.ndarray) -> np.ndarray:
        import torch

        # TorchGate refuses less than two windows, and its inverse transform drops an incomplete hop.
        length = max(2 * _WINDOW, -(-len(wave) // _HOP) * _HOP)
        padded = torch.from_numpy(audio.fit(wave, length).astype(np.float32))
        gated: np.ndarray = _gate(self.stationary, self.strength)(padded[None])[0].numpy()
        return gated[: len(wave)]

    def clip_ids(self) -> tuple[str, ...]:
        return ()


def spectral_gating(rng: np.random.Generator, scene: Scene) -> SpectralGating:
    """Stationary or not with equal probability, strength uniform in 0.6..1."""
    return SpectralGating(bool(rng.random() < 0.5), float(rng.uniform(0.6, 1.0)))


def _gate(stationary: bool, strength: float) -> "torch.nn.Module":
    import torch
    from noisereduce.torchgate import TorchGate

    class Gate(TorchGate):  # type: ignore[misc]
        def _nonstationary_mask(self, X_abs: torch.Tensor) -> torch.Tensor:
            # It divides by the moving mean of magnitudes, 0/0 in digital silence, and the mask's smoothing
            # would spread the NaN to bins with signal. 1e-20 is far below a 16-bit step; the gate closes.
            return super()._nonstationary_mask(X_abs + 1e-20)  # type: ignore[no-any-return]

    return Gate(
        audio.SAMPLE_RATE,
        nonstationary=not stationary,
        n_movemean_nonstationary=_MOVING_MEAN,
        prop_decrease=strength,
        n_fft=_WINDOW,
        hop_length=_HOP,
    )
