"""Speaker embeddings: the package's own for three waves, windows, levels."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from manifests import voice
from speechdistill.io.errors import UserError, WeightsError
from speechdistill.models import parameters
from speechdistill.models.networks import speaker_encoder
from speechdistill.models.networks.speaker_encoder import SpeakerEncoder, raised, window_starts

# Every 24th component of what `resemblyzer` 0.1.4 gives for 0.05 * voice(seconds, seed), raised to -30 dBFS, untrimmed.
OF_THE_PACKAGE = {
    (3.0, 7): [0.21099, 0, 0, 0, 0.02612, 0.073, 0.03032, 0.14119, 0, 0, 0.04531],
    (0.9, 7): [0.28619, 0, 0, 0, 0.02882, 0.04633, 0.02662, 0.15281, 0, 0, 0.02495],
    (5.3, 1): [0.17315, 0, 0, 0, 0.05376, 0.09663, 0.0362, 0.14169, 0, 0, 0.04017],
}
needs_weights = pytest.mark.skipif(
    importlib.util.find_spec("resemblyzer") is None, reason="pip install --no-deps resemblyzer==0.1.4"
)


@needs_weights
def test_embeddings_are_those_of_the_package() -> None:
    encoder, digest = speaker_encoder.load()
    assert len(digest) == 64 and parameters.count(encoder).trainable == 1_423_616
    waves = [(0.05 * voice(seconds, seed=seed)).astype(np.float32) for seconds, seed in OF_THE_PACKAGE]
    embeddings = encoder.embed(waves)
    assert embeddings.shape == (3, 256) and embeddings.min() >= 0
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embeddings[:, ::24], list(OF_THE_PACKAGE.values()), atol=2e-5)


@pytest.mark.parametrize(
    ("num_samples", "starts"),
    [(1, [0]), (16_000, [0]), (25_600, [0]), (35_000, [0, 77]), (43_000, [0, 77]), (48_000, [0, 77, 154])],
)
def test_a_last_window_that_is_less_than_three_quarters_full_is_left_out(num_samples: int, starts: list[int]) -> None:
    assert window_starts(num_samples) == starts
    assert all(num_samples - start * 160 >= 0.75 * 25_600 for start in starts[1:])


def test_quiet_waves_are_raised_and_loud_ones_stay() -> None:
    wave = np.sin(np.arange(1_600)).astype(np.float32)
    assert 20 * np.log10(np.sqrt(np.mean(raised(0.001 * wave) ** 2))) == pytest.approx(-30, abs=0.01)
    np.testing.assert_array_equal(raised(wave), wave)
    assert not raised(np.zeros(10, np.float32)).any()


def test_waves_of_any_lengths_are_embedded_as_if_alone() -> None:
    torch.manual_seed(0)
    encoder = SpeakerEncoder().eval()
    waves = [voice(seconds, seed=1).astype(np.float32) for seconds in (0.2, 1.7, 4.0)]
    together = encoder.embed(waves)
    for wave, embedding in zip(waves, together, strict=True):
        np.testing.assert_array_equal(encoder.embed([wave])[0], embedding)


def test_weights_that_are_missing_or_others_are_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no such weights file; `pip install --no-deps resemblyzer==0.1.4`"):
        speaker_encoder.load(f"{tmp_path}/none.pt")
    torch.save({"model_state": {"lstm": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="not the weights of a speaker encoder"):
        speaker_encoder.load(f"{tmp_path}/other.pt")
