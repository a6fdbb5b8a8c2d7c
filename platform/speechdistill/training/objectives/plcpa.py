"""The loss of speech enhancement: power-law compressed phase-aware with an asymmetric term, and SI-SDR."""

import torch
from torch import Tensor

POWER = 0.3
WEIGHTS = (0.5, 0.5, 1.0)
"""Weights of the terms: magnitudes, complex spectra, asymmetric term."""

_WINDOW, _HOP = 512, 256
_SMALLEST = 1e-8  # added to powers: their roots have finite gradients on digital silence


def plcpa(estimate: Tensor, target: Tensor) -> Tensor:
    """The loss of each sample, (batch,), from waves (batch, num_samples) at 16 kHz.

    With magnitudes to the power 0.3: squared error of the magnitudes, squared error of the complex spectra, and the
    squared error where the estimate is weaker than the target, which is over-suppression; each a mean over time and
    frequency (Eskimez et al. 2021, equations 1 to 3).
    """
    (clean, clean_complex), (enhanced, enhanced_complex) = map(_compressed, (target, estimate))
    terms = (
        (clean - enhanced).square(),
        (clean_complex - enhanced_complex).abs().square(),
        torch.relu(clean - enhanced).square(),
    )
    means = torch.stack([term.mean(dim=(1, 2)) for term in terms])
    return (means.new_tensor(WEIGHTS)[:, None] * means).sum(dim=0)


def si_sdr_db(estimate: Tensor, target: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB, (batch,), of waves (batch, num_samples) without their means.

    Le Roux et al. 2019, equation 3. Bounded by its small constants for silence, with finite gradients.
    """
    estimate, target = (wave - wave.mean(dim=1, keepdim=True) for wave in (estimate, target))
    scale = (estimate * target).sum(1, keepdim=True) / (target.square().sum(1, keepdim=True) + _SMALLEST)
    wanted = scale * target
    ratio = (wanted.square().sum(1) + _SMALLEST) / ((estimate - wanted).square().sum(1) + _SMALLEST)
    return 10 * torch.log10(ratio)


def _compressed(waves: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitudes to the power 0.3, and the spectra with these magnitudes: (batch, bins, frames) each."""
    window = torch.hann_window(_WINDOW, dtype=waves.dtype, device=waves.device)
    spectra = torch.stft(waves, _WINDOW, _HOP, window=window, center=True, return_complex=True)
    power = spectra.real.square() + spectra.imag.square() + _SMALLEST
    return power ** (POWER / 2), spectra * power ** ((POWER - 1) / 2)
