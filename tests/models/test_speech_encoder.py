"""Encoders of every kind against transformers' whole models; padding is not heard."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from small_models import speech_encoder as small
from speechdistill.models.networks import speech_encoder

KINDS = list(product(("wav2vec2", "hubert", "wavlm"), (False, True)))
NAMES = [f"{kind}-{'large' if large else 'base'}" for kind, large in KINDS]


def wave(num_samples: int, seed: int = 0) -> np.ndarray:
    return (0.1 + 0.3 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def hidden_states(folder: str, samples: torch.Tensor, layer: int) -> torch.Tensor:
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder, local_files_only=True).eval()
    with torch.no_grad():
        states: torch.Tensor = model(samples, output_hidden_states=True).hidden_states[layer][0]
    return states


@pytest.mark.parametrize(("kind", "large"), KINDS, ids=NAMES)
def test_the_layer_is_that_of_the_whole_model(kind: str, large: bool, tmp_path: Path) -> None:
    folder = small(tmp_path, kind, large)
    encoder, _ = speech_encoder.load(folder, 3)
    samples, lengths = encoder.prepared([wave(8_000)])
    frames, counts = encoder(samples, lengths)
    assert counts.tolist() == [len(frames[0])]
    torch.testing.assert_close(frames[0], hidden_states(folder, samples, 3), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("kind", "large"), KINDS, ids=NAMES)
def test_padding_is_not_heard(kind: str, large: bool, tmp_path: Path) -> None:
    encoder, _ = speech_encoder.load(small(tmp_path, kind, large), 3)
    waves = [wave(9_000), wave(5_000, seed=1)]
    together, counts = encoder(*encoder.prepared(waves))
    alone, _ = encoder(*encoder.prepared(waves[1:]))
    difference = float((together[1, : counts[1]] - alone[0]).abs().max())
    assert int(counts[1]) == alone.shape[1]
    assert difference < 1e-4 < float(together[1, : counts[1]].abs().max())


@pytest.mark.parametrize(("kind", "large"), KINDS, ids=NAMES)
def test_all_weights_are_parameters(kind: str, large: bool, tmp_path: Path) -> None:
    encoder, _ = speech_encoder.load(small(tmp_path, kind, large), 3)
    weights = {name for name, value in encoder.model.state_dict().items() if value.is_floating_point()}
    parameters = dict(encoder.model.named_parameters())
    assert weights == set(parameters)
    assert not any(parameter.requires_grad for parameter in parameters.values())


def test_waves_are_prepared_as_the_checkpoint_says(tmp_path: Path) -> None:
    folder = small(tmp_path, "wavlm", large=False)
    encoder, digest = speech_encoder.load(folder, 1)
    samples, _ = encoder.prepared([wave(8_000)])
    assert float(samples.mean()) == pytest.approx(0, abs=1e-4) and float(samples.std()) == pytest.approx(1, abs=1e-3)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    encoder, other = speech_encoder.load(folder, 1)
    np.testing.assert_array_equal(encoder.prepared([wave(8_000)])[0][0].numpy(), wave(8_000))
    assert other != digest  # a head that was trained on one is not for the other


def test_nothing_is_random_in_training(tmp_path: Path) -> None:
    encoder, _ = speech_encoder.load(small(tmp_path, "wav2vec2", large=True), 3)
    encoder.train()
    inputs = encoder.prepared([wave(8_000)])
    torch.testing.assert_close(encoder(*inputs)[0], encoder(*inputs)[0], rtol=0, atol=0)


def test_what_is_no_encoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="model of type 'bert'; choose from wav2vec2, hubert, wavlm"):
        speech_encoder.load(str(tmp_path), 1)
