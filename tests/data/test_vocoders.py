"""Vocoders: HiFi-GAN from a folder of weights (here small random ones), and LPCNet where its library is."""

import json
import random
import shutil
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.signal import butter, sosfiltfilt

import small_models
from manifests import voice
from speechdistill.data import components
from speechdistill.data.degradations import vocoders
from speechdistill.data.degradations.vocoders import Codec2Lpcnet, HifiGan
from speechdistill.io import assets, audio
from speechdistill.io.assets import Asset

RATE = audio.SAMPLE_RATE


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_models.hifigan(tmp_path_factory.mktemp("hifigan"))


@pytest.fixture(scope="module")
def network(weights: Path) -> Any:
    return HifiGan.load(weights, "cpu")


STEP = HifiGan("", "")


def asset(folder: Path) -> Asset:
    return assets.looked_up(HifiGan.need, str(folder))


def mel_pairs(wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log mels by transformers and by us, (frames, 80) each."""
    from transformers import SpeechT5FeatureExtractor

    theirs = SpeechT5FeatureExtractor()(audio_target=wave, sampling_rate=RATE)["input_values"][0]
    return np.asarray(theirs), vocoders.log_mels(torch.from_numpy(wave[None]))[0].numpy()


@pytest.mark.parametrize("gain", [1.0, 1e-4, 0.0])
def test_mels_are_those_that_the_network_was_trained_on(gain: float) -> None:
    rng = np.random.default_rng(0)
    gap = np.zeros(RATE // 2, np.float32)
    wave = np.concatenate([voice(1.0), gap, 0.1 * rng.standard_normal(RATE // 3).astype(np.float32)])
    for num_samples in (1024, 1025, len(wave)):
        theirs, ours = mel_pairs(np.float32(gain) * wave[-num_samples:])
        assert theirs.shape == ours.shape
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("num_samples", [1, 2, 255, 256, 511, 513, 1023, 1024, 12_345])
def test_any_wave_comes_out_finite_and_of_its_length(network: Any, num_samples: int) -> None:
    white = np.random.default_rng(0).standard_normal(num_samples)
    waves = np.stack([0 * white, 1e-30 * white, white, 300 * white]).astype(np.float32)
    waves.setflags(write=False)
    made = STEP.apply_batch(network, waves)
    assert made.shape == waves.shape and made.dtype == np.float32 and np.isfinite(made).all()


def test_a_wave_does_not_depend_on_its_batch(network: Any) -> None:
    waves = np.stack([voice(1.0, seed=seed) for seed in range(5)])
    made = STEP.apply_batch(network, waves)
    assert np.abs(made).max() > 0.1
    for wave, together in zip(waves, made, strict=True):
        np.testing.assert_allclose(STEP.apply_batch(network, wave[None])[0], together, atol=1e-5)


def test_what_is_made_stands_where_the_wave_was(network: Any) -> None:
    for place in (3_000, 8_111, 13_000):
        click = np.zeros((2, RATE), np.float32)
        click[1, place] = 1
        silent, made = STEP.apply_batch(network, click)
        change = np.square(made - silent, dtype=np.float64)
        # Frames reach 512 samples to both sides, and the network some frames.
        assert abs(np.average(np.arange(RATE), weights=change) - place) < 256
        assert not change[: place - 2_500].any() and not change[place + 2_500 :].any()


def test_a_wave_above_full_scale_is_brought_back(network: Any) -> None:
    wave = voice(0.5) / np.abs(voice(0.5)).max()
    np.testing.assert_array_equal(STEP.apply_batch(network, 4 * wave[None]), 4 * STEP.apply_batch(network, wave[None]))


def test_the_component_finds_its_weights_and_the_step_its_network(weights: Path) -> None:
    (need,) = components.component("vocoders.hifigan").needs
    assert components.component("vocoders.hifigan").network is HifiGan and need == HifiGan.need
    scene: Any = type("Scene", (), {"assets": {"hifigan": asset(weights)}})()
    step = vocoders.hifigan.draw(np.random.default_rng(0), scene)
    assert components.from_json(json.loads(json.dumps(components.to_json(step)))) == step
    wave = voice(0.5)
    np.testing.assert_array_equal(step.apply(wave), STEP.apply_batch(HifiGan.load(weights, "cpu"), wave[None])[0])


def test_loading_needs_no_network_and_changes_no_global_state(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("an address was looked up")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)

    def state() -> list[object]:
        numpy_state = np.random.get_state()  # noqa: NPY002
        torch_state = (torch.random.get_rng_state().tolist(), torch.get_num_threads(), torch.get_default_dtype())
        flags = (torch.is_grad_enabled(), torch.backends.cudnn.allow_tf32)
        return [numpy_state[1].tobytes(), random.getstate(), *torch_state, *flags]

    before = state()
    STEP.apply_batch(HifiGan.load(weights, "cpu"), voice(0.2)[None])
    assert state() == before


def test_weights_as_pickle_are_the_same(weights: Path, network: Any, tmp_path: Path) -> None:
    shutil.copy(weights / "config.json", tmp_path)
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    wave = voice(0.3)[None]
    again = STEP.apply_batch(HifiGan.load(tmp_path, "cpu"), wave)
    np.testing.assert_array_equal(again, STEP.apply_batch(network, wave))


@pytest.mark.parametrize(
    "changes",
    [{"sampling_rate": 22_050}, {"upsample_rates": [4, 4, 4, 2]}, {"model_in_dim": 100}],
    ids=["rate", "hop", "mels"],
)
def test_a_network_for_other_mels_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path} is not .* are \(.*\), not \(16000, 256, 80\)"):
        HifiGan(*asset(small_models.hifigan(tmp_path, **changes))).apply(voice(0.1))


def test_what_is_no_such_network_is_refused(weights: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    def refused(reason: str) -> None:
        with pytest.raises(ValueError, match=rf"{tmp_path} is not the folder of SpeechT5's HiFi-GAN.*{reason}"):
            HifiGan(*asset(tmp_path)).apply(voice(0.1))

    shutil.copy(weights / "config.json", tmp_path)
    refused("pytorch_model.bin")
    file = tmp_path / "model.safetensors"
    file.write_bytes((weights / "model.safetensors").read_bytes()[:-9])
    refused("MetadataIncompleteBuffer|incomplete metadata")
    save_file({"conv_pre.weight": torch.zeros(3)}, file, {"format": "pt"})
    refused("size|shape")
    save_file({"other": torch.zeros(3)}, file, {"format": "pt"})
    refused("the weights .*conv_post.* are missing")
    (tmp_path / "config.json").write_text("{")
    refused("JSON")


# LPCNet


@pytest.fixture(scope="module")
def lpcnet() -> Codec2Lpcnet:
    try:
        vocoders.lpcnet_library()
    except ImportError as error:
        pytest.skip(str(error))
    return Codec2Lpcnet()


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    vocoders.lpcnet_library.cache_clear()
    monkeypatch.setattr("ctypes.util.find_library", lambda name: "libc.so.6")
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())  # a libcodec2 without LPCNet
    with pytest.raises(ImportError, match="apt install libcodec2"):
        components.component("vocoders.lpcnet_codec2").check()
    step = vocoders.lpcnet_codec2.draw(np.random.default_rng(0), None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match="apt install libcodec2"):
        step.apply(voice(0.1))


def test_a_coder_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocoders, "lpcnet_library", lambda: "libc.so.6")
    with pytest.raises(RuntimeError, match=r"LPCNet failed: .*lpcnet_freedv_create"):
        Codec2Lpcnet().apply(voice(0.1))


@pytest.mark.parametrize("num_samples", [1, 480, 481, 5_000])
@pytest.mark.parametrize("gain", [0.0, 1e-30, 1.0, 300.0])
def test_lpcnet_keeps_the_contract(lpcnet: Codec2Lpcnet, num_samples: int, gain: float) -> None:
    wave = (gain * np.random.default_rng(0).standard_normal(num_samples)).astype(np.float32)
    wave.setflags(write=False)
    coded = lpcnet.apply(wave)
    assert coded.shape == wave.shape and coded.dtype == np.float32 and np.isfinite(coded).all()


def test_lpcnet_makes_the_same_bits_again(lpcnet: Codec2Lpcnet) -> None:
    wave = voice(1.0)
    first = lpcnet.apply(wave)
    lpcnet.apply(voice(0.5, seed=1))
    np.testing.assert_array_equal(lpcnet.apply(wave), first)
    assert replace(lpcnet) == lpcnet == components.from_json(components.to_json(lpcnet))


def envelope(wave: np.ndarray) -> np.ndarray:
    """Of the waveform, since LPCNet makes the phase anew."""
    lowpass = butter(2, 40, fs=RATE, output="sos")
    return np.asarray(np.log(np.maximum(sosfiltfilt(lowpass, wave.astype(np.float64) ** 2), 0) + 1e-7))


def test_lpcnet_is_aligned_and_as_loud(lpcnet: Codec2Lpcnet) -> None:
    wave = voice(4.0)
    coded = lpcnet.apply(wave)
    inner, whole = envelope(wave)[800:-800], envelope(coded)
    scores = [np.corrcoef(inner, whole[lag : lag + len(inner)])[0, 1] for lag in range(0, 1600, 8)]
    assert abs(8 * int(np.argmax(scores)) - 800) <= 80  # half a frame of its features
    assert max(scores) > 0.8
    assert 0.5 < np.std(coded) / np.std(wave) < 1.5
