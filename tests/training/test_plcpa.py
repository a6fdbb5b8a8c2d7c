"""PLCPA and SI-SDR against numpy, and on digital silence."""

import numpy as np
import torch

from speechdistill.training.objectives.plcpa import plcpa, si_sdr_db


def by_hand(estimate: np.ndarray, target: np.ndarray) -> float:
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(512) / 512)

    def spectra(wave: np.ndarray) -> np.ndarray:
        padded = np.pad(wave, 256, mode="reflect")
        return np.fft.rfft(np.lib.stride_tricks.sliding_window_view(padded, 512)[::256] * hann)

    s, e = (spectra(wave) for wave in (target, estimate))
    clean, enhanced = (np.abs(x) ** 0.3 for x in (s, e))
    phases = [x / np.abs(x) for x in (s, e)]
    error = np.abs(clean * phases[0] - enhanced * phases[1]) ** 2
    over = np.maximum(clean - enhanced, 0) ** 2
    return float(0.5 * ((clean - enhanced) ** 2).mean() + 0.5 * error.mean() + over.mean())


def test_the_loss_is_that_of_its_equations_for_each_sample() -> None:
    rng = np.random.default_rng(0)
    target, estimate = rng.standard_normal((2, 3, 4_000))
    losses = plcpa(torch.from_numpy(estimate), torch.from_numpy(target))
    expected = [by_hand(*pair) for pair in zip(estimate, target, strict=True)]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-6)
    assert plcpa(torch.from_numpy(target), torch.from_numpy(target)).abs().max() == 0


def test_suppression_costs_more_than_as_much_noise() -> None:
    target = torch.randn(1, 4_000, generator=torch.Generator().manual_seed(0))
    assert plcpa(0.5 * target, target) > 1.5 * plcpa(1.5 * target, target)


def test_si_sdr_ignores_scale_and_knows_a_ratio() -> None:
    rng = torch.Generator().manual_seed(0)
    target, noise = torch.randn(2, 1, 160_000, generator=rng, dtype=torch.float64)
    noisy = target + 0.1 * noise * (target.norm() / noise.norm())
    assert abs(float(si_sdr_db(noisy, target)) - 20) < 0.1
    torch.testing.assert_close(si_sdr_db(5 * noisy, target), si_sdr_db(noisy, 3 * target))


def test_digital_silence_has_finite_losses_and_gradients() -> None:
    for one, other in ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0)):
        estimate = (one * torch.randn(2, 4_000)).requires_grad_()
        target = other * torch.randn(2, 4_000)
        loss = plcpa(estimate, target).sum() - si_sdr_db(estimate, target).sum()
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(estimate.grad).all()  # type: ignore[arg-type]
