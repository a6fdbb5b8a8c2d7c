"""The student network: sizes, the released weights, what it does with precision and level."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from speechdistill.models.networks.conv_transformer import (
    FRAME_SAMPLES,
    SEGMENT_SAMPLES,
    VARIANTS,
    ConvTransformer,
    ConvTransformerConfig,
    features,
)
from speechdistill.models.teachers import distillmos

# By the formula of the released code.
COUNTS = {
    "v0": 176_146,
    "v1": 278_914,
    "v2": 429_122,
    "v3": 767_442,
    "v4": 1_114_082,
    "v5": 1_724_002,
    "v6": 2_551_170,
    "v7": 4_133_226,
    "v8": 13_045_250,
    "v9": 45_711_298,
}
TINY = ConvTransformerConfig(max_channels=4, stride_convs=4, dim=8, heads=2, layers=2)

GOLDEN = """
import json
import numpy as np, torch
from speechdistill.models.networks.conv_transformer import SEGMENT_SAMPLES
from speechdistill.models.options import TeacherOptions
from speechdistill.models.teachers import distillmos
t = np.arange(SEGMENT_SAMPLES) / 16000
noise = 0.1 * np.random.RandomState(0).standard_normal(SEGMENT_SAMPLES)
waves = np.stack([np.zeros(SEGMENT_SAMPLES), 0.5 * np.sin(2 * np.pi * 440 * t), noise]).astype(np.float32)
network = distillmos.load(TeacherOptions(device="cpu")).forward.network
with torch.inference_mode():
    scores = [float(1 + 4 * network(wave[None]).double().sigmoid()) for wave in torch.from_numpy(waves)]
print(json.dumps(scores))
"""


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_its_number_of_trainable_parameters(name: str) -> None:
    with torch.device("meta"):
        network = ConvTransformer(VARIANTS[name]())
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == COUNTS[name]


def test_there_are_ten_variants_and_each_names_its_size() -> None:
    assert list(VARIANTS) == list(COUNTS)
    assert all(f"{COUNTS[name]:,} parameters" in str(variant.__doc__) for name, variant in VARIANTS.items())


def test_convolutions_of_v7_have_their_published_size() -> None:
    assert sum(p.numel() for p in ConvTransformer().cnn.parameters()) == 1_587_328


def test_released_file_loads_key_by_key_with_its_own_position_encoding() -> None:
    path = Path(distillmos._released_weights())
    released = torch.load(path, weights_only=True)["model"]
    network = ConvTransformer()
    ours = network.state_dict()
    assert list(ours) == list(released)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in released.items()}
    pe = "transformer_pool_attn.transformer.position_encoding.pe"
    torch.testing.assert_close(ours[pe], released[pe], rtol=0, atol=1e-4)  # angles up to 383 rad in float32
    network.load_state_dict(released, strict=True)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="the known answers are those of MKL's FFT")
def test_released_weights_give_the_known_scores_of_silence_sine_and_noise() -> None:
    # A pure tone leaves most bins at the FFT's rounding error, and the compression lifts it: the released code
    # itself scores it 2.0636, 2.0626 or 2.0623 by the CPU's instructions. This setting of MKL is the same on all.
    environment = os.environ | {"MKL_CBWR": "COMPATIBLE"}
    run = subprocess.run([sys.executable, "-c", GOLDEN], env=environment, capture_output=True, check=True)
    assert json.loads(run.stdout) == pytest.approx([1.969043, 2.063608, 1.226667], abs=1e-5)


def test_score_does_not_depend_on_the_level() -> None:
    network = ConvTransformer(TINY).eval()
    wave = torch.randn(1, SEGMENT_SAMPLES, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(network(wave), network(1e-3 * wave), rtol=0, atol=1e-5)


def test_features_are_the_compressed_spectrum_and_float32_under_autocast() -> None:
    wave = torch.randn(2, SEGMENT_SAMPLES, generator=torch.Generator().manual_seed(0))
    spectrum = features(wave)
    assert spectrum.shape == (2, 2, 161, 768)
    padded = torch.nn.functional.pad(wave[:1] / wave[:1].abs().max(), (80, 80), mode="reflect")
    frame = torch.fft.rfft(padded[0, 160 * 5 : 160 * 5 + 320] * torch.hann_window(320))
    expected = frame.abs() ** 0.3 * torch.exp(1j * frame.angle())
    torch.testing.assert_close(torch.complex(*spectrum[0, :, :, 5]), expected, rtol=1e-3, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        low = features(wave)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, spectrum, rtol=0, atol=0)


@pytest.mark.parametrize("low_precision", [False, True])
def test_every_parameter_is_trained(low_precision: bool) -> None:
    network = ConvTransformer(TINY).train()
    wave = torch.randn(2, SEGMENT_SAMPLES, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
        logits = network(wave)
    assert (logits.shape, logits.dtype) == ((2,), torch.float32)
    logits.square().sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_gradient_of_silence_is_finite() -> None:
    wave = torch.zeros(1, SEGMENT_SAMPLES, requires_grad=True)
    features(wave).sum().backward()
    assert wave.grad is not None
    assert wave.grad.isfinite().all()


def test_shorter_crops_and_float64_go_through() -> None:
    network = ConvTransformer(TINY).double()
    logits = network(torch.randn(2, 6 * FRAME_SAMPLES, dtype=torch.float64))
    assert (logits.shape, logits.dtype) == ((2,), torch.float64)


@pytest.mark.parametrize(
    "shape", [(SEGMENT_SAMPLES,), (1, SEGMENT_SAMPLES - 1), (1, 1, SEGMENT_SAMPLES), (1, SEGMENT_SAMPLES + 320), (1, 0)]
)
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected segments \(batch, 122880\)"):
        ConvTransformer(TINY)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 200, "heads": 7}, "multiple of heads"),
        ({"dim": 25, "heads": 5}, "even"),
        ({"stride_convs": 6}, "at most 5"),
        ({"layers": 0}, "at least 1"),
        ({"segment_samples": 1_000}, r"segments of 0\.0625 s .* multiple of 0\.02 s, at most 7\.68"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConvTransformerConfig(**sizes)
