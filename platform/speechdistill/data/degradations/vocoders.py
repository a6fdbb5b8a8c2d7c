"""Vocoders: speech resynthesised from its features. Length and alignment stay the same."""

import ctypes
import ctypes.util
import math
import subprocess
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from speechdistill.data.degradation import Component, Neural, Scene
from speechdistill.io import audio
from speechdistill.io.assets import Need
from speechdistill.io.errors import LibraryError

if TYPE_CHECKING:
    import torch

# Log mel spectrogram of SpeechT5 (`audio_target` of `SpeechT5FeatureExtractor` in transformers).
_WINDOW, _HOP, _MELS = 1024, 256, 80
_BAND_HZ = (80.0, 7600.0)
_FLOOR = 1e-10

# lpcnet_freedv.h of codec2 1.0.5; delay by cross-correlation of envelopes, since LPCNet does not keep the phase
_LPCNET_FRAME, _LPCNET_DELAY = 480, 911


@dataclass(frozen=True)
class HifiGan(Neural):
    """HiFi-GAN (Kong et al. 2020) of SpeechT5, from the log mel spectrogram of the wave at 62.5 frames a second.

    The network's output is within full scale, so a louder wave is scaled down first and scaled back.
    """

    need: ClassVar[Need] = Need(
        "hifigan",
        "the folder of SpeechT5's HiFi-GAN, in the format of transformers",
        "https://huggingface.co/microsoft/speecht5_hifigan",
        "MIT",
        files=("config.json", "model.safetensors", "pytorch_model.bin"),
        hub="microsoft/speecht5_hifigan",
    )

    @classmethod
    def load(cls, path: Path, device: str) -> Any:
        import torch
        from transformers import SpeechT5HifiGan

        loaded: Any = SpeechT5HifiGan.from_pretrained(
            path, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        network, report = loaded
        if report["missing_keys"]:  # from_pretrained draws these at random
            raise ValueError(f"the weights {sorted(report['missing_keys'])[:3]} are missing")
        config = network.config
        actual = config.sampling_rate, math.prod(config.upsample_rates), config.model_in_dim
        if actual != (audio.SAMPLE_RATE, _HOP, _MELS):
            raise ValueError(f"Hz, hop and mels are {actual}, not {(audio.SAMPLE_RATE, _HOP, _MELS)}")
        return network.eval().requires_grad_(False).to(device)

    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        import torch

        scale = np.maximum(np.float32(1), np.abs(waves).max(axis=1, keepdims=True))
        made = network(log_mels(torch.from_numpy(waves / scale).to(network.device))).cpu().numpy()
        return np.asarray(made[:, : waves.shape[1]] * scale)


def _draw_hifigan(rng: np.random.Generator, scene: Scene) -> HifiGan:
    """Return copy synthesis by HiFi-GAN (Distill-MOS, section IV-B)."""
    return HifiGan(*scene.assets[HifiGan.need.name])


def log_mels(waves: "torch.Tensor") -> "torch.Tensor":
    """Map float32 (batch, num_samples) to (batch, num_samples // 256 + 1, 80): log10 of Slaney mels of the magnitude.

    Frame t is centred on sample 256 t, the first of the samples that the network makes of it. Computed in double
    precision, like the original: the logarithm of near silence would show the rounding of float32.
    """
    import torch

    waves = torch.nn.functional.pad(
        waves, (0, max(0, _WINDOW - waves.shape[1]))
    ).double()  # torch.stft cannot reflect shorter ones
    window = torch.hann_window(_WINDOW, dtype=waves.dtype, device=waves.device)
    magnitudes = torch.stft(waves, _WINDOW, _HOP, window=window, pad_mode="reflect", return_complex=True).abs()
    mels = magnitudes.mT @ torch.from_numpy(_filters()).to(waves.device)
    return mels.clamp(min=_FLOOR).log10().float()


@lru_cache(maxsize=1)
def _filters() -> np.ndarray:
    from transformers.audio_utils import mel_filter_bank

    low, high = _BAND_HZ
    bins = _WINDOW // 2 + 1
    return np.asarray(mel_filter_bank(bins, _MELS, low, high, audio.SAMPLE_RATE, norm="slaney", mel_scale="slaney"))


@dataclass(frozen=True)
class Codec2Lpcnet:
    """LPCNet as a codec at 1.7 kb/s (FreeDV 2020, in libcodec2 1.0): harsher than a vocoder on unquantised features.

    A wave above full scale is scaled down for coding and scaled back. `apply` takes 0.5 s for each second of audio, and
    raises `LibraryError` if the library is missing.
    """

    def apply(self, wave: np.ndarray) -> np.ndarray:
        scale = np.float32(max(1.0, np.abs(wave).max(initial=0.0)))
        count = -(-(len(wave) + _LPCNET_DELAY) // _LPCNET_FRAME)
        pcm = audio.quantise(audio.fit(wave / scale, count * _LPCNET_FRAME))
        # A process for each wave, since LPCNet keeps state between waves. Not a fork, which could copy a held lock.
        done = subprocess.run(
            [sys.executable, "-ISc", _CODER, lpcnet_library(), str(_LPCNET_FRAME)],
            input=pcm.tobytes(),
            capture_output=True,
        )
        if done.returncode or len(done.stdout) != 2 * len(pcm):
            last = done.stderr.decode(errors="replace").splitlines()[-1:]
            raise RuntimeError(f"LPCNet failed: {''.join(last) or f'exit code {done.returncode}'}")
        coded = np.frombuffer(done.stdout, np.int16)[_LPCNET_DELAY:][: len(wave)]
        return coded.astype(np.float32) / np.float32(32768) * scale

    def clip_ids(self) -> tuple[str, ...]:
        return ()


def _draw_lpcnet_codec2(rng: np.random.Generator, scene: Scene) -> Codec2Lpcnet:
    """Return the LPCNet codec, which has no parameters."""
    return Codec2Lpcnet()


@lru_cache(maxsize=1)
def lpcnet_library() -> str:
    """Return the name of the library with LPCNet; raises `LibraryError` saying what to install if there is none."""
    for name in (ctypes.util.find_library("codec2"), "libcodec2.so.1.0", ctypes.util.find_library("lpcnetfreedv")):
        try:
            if name and hasattr(ctypes.CDLL(name), "lpcnet_freedv_create"):
                return name
        except OSError:
            continue
    raise LibraryError(
        "no library with LPCNet is installed",
        "apt install libcodec2-1.0 (Debian 12; codec2 1.2 and later lack it), or leave vocoders.lpcnet_codec2 out "
        "of the recipe",
    )


# Program of the process for a wave, int16 in and out. It imports only ctypes and starts in 15 ms.
_CODER = """
import ctypes, sys
codec2, frame = ctypes.CDLL(sys.argv[1]), int(sys.argv[2])
codec2.lpcnet_freedv_create.restype = ctypes.c_void_p
codec2.lpcnet_samples_per_frame.argtypes = codec2.lpcnet_bits_per_frame.argtypes = [ctypes.c_void_p]
codec2.lpcnet_enc.argtypes = codec2.lpcnet_dec.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
coder = codec2.lpcnet_freedv_create(1)
if codec2.lpcnet_samples_per_frame(coder) != frame:
    sys.exit(f"the frames of the library are not {frame} samples")
bits = ctypes.create_string_buffer(codec2.lpcnet_bits_per_frame(coder))
samples = ctypes.create_string_buffer(2 * frame)
while block := sys.stdin.buffer.read(2 * frame):
    samples.raw = block
    codec2.lpcnet_enc(coder, samples, bits)
    codec2.lpcnet_dec(coder, bits, samples)
    sys.stdout.buffer.write(samples.raw)
"""

hifigan = Component(_draw_hifigan, HifiGan, needs=(HifiGan.need,), libraries=("transformers",))
lpcnet_codec2 = Component(_draw_lpcnet_codec2, Codec2Lpcnet, check=lpcnet_library)
