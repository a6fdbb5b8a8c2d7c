"""Vocoders: speech made anew from its features, as networks of speech synthesis do; length and alignment are kept."""

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

from speechdistill.data.degradation import Neural, Scene
from speechdistill.io import audio
from speechdistill.io.assets import Need
from speechdistill.io.errors import LibraryError

if TYPE_CHECKING:
    import torch

# The log mel spectrogram of SpeechT5 (transformers' `SpeechT5FeatureExtractor`, of `audio_target`).
_WINDOW, _HOP, _MELS = 1024, 256, 80
_BAND_HZ = (80.0, 7600.0)
_FLOOR = 1e-10

# lpcnet_freedv.h of codec2 1.0.5; the delay by cross-correlation of envelopes, as the waveform's phase is not kept
_LPCNET_FRAME, _LPCNET_DELAY = 480, 911


@dataclass(frozen=True)
class HifiGan(Neural):
    """HiFi-GAN (Kong et al. 2020) of SpeechT5, from the wave's own log mel spectrogram of 62.5 frames a second.

    A wave above full scale, which the network cannot make, is made at full scale and brought back.
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
        network, found = loaded
        if found["missing_keys"]:  # which it has drawn at random
            raise ValueError(f"the weights {sorted(found['missing_keys'])[:3]} are missing")
        config = network.config
        makes = config.sampling_rate, math.prod(config.upsample_rates), config.model_in_dim
        if makes != (audio.SAMPLE_RATE, _HOP, _MELS):
            raise ValueError(f"Hz, hop and mels are {makes}, not {(audio.SAMPLE_RATE, _HOP, _MELS)}")
        return network.eval().requires_grad_(False).to(device)

    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        import torch

        scale = np.maximum(np.float32(1), np.abs(waves).max(axis=1, keepdims=True))
        made = network(log_mels(torch.from_numpy(waves / scale).to(network.device))).cpu().numpy()
        return np.asarray(made[:, : waves.shape[1]] * scale)


def hifigan(rng: np.random.Generator, scene: Scene) -> HifiGan:
    """Copy synthesis by HiFi-GAN (Distill-MOS, section IV-B)."""
    return HifiGan(*scene.assets[HifiGan.need.name])


def log_mels(waves: "torch.Tensor") -> "torch.Tensor":
    """float32 (batch, num_samples) to (batch, num_samples // 256 + 1, 80): log10 of Slaney mels of the magnitude.

    Frame t is centred on sample 256 t, the first of those that the network makes of it. In double precision, like the
    original: the logarithm of what is nearly silent would show the rounding of float32.
    """
    import torch

    waves = torch.nn.functional.pad(waves, (0, max(0, _WINDOW - waves.shape[1]))).double()  # a shorter one has no edges
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
    """LPCNet as a codec at 1.7 kb/s (of FreeDV 2020, in libcodec2 1.0): harsher than a vocoder on unquantised features.

    A wave above full scale is coded at full scale and brought back. `apply` takes 0.5 s for each second of audio, and
    raises `LibraryError` if the library is missing.
    """

    def apply(self, wave: np.ndarray) -> np.ndarray:
        scale = np.float32(max(1.0, np.abs(wave).max(initial=0.0)))
        count = -(-(len(wave) + _LPCNET_DELAY) // _LPCNET_FRAME)
        pcm = audio.quantise(audio.fit(wave / scale, count * _LPCNET_FRAME))
        # It keeps state in the process, so the same clip would come out differently later; a fork could copy a lock.
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


def lpcnet_codec2(rng: np.random.Generator, scene: Scene) -> Codec2Lpcnet:
    """The LPCNet codec, which has no parameters."""
    return Codec2Lpcnet()


@lru_cache(maxsize=1)
def lpcnet_library() -> str:
    """The name of the library with LPCNet; raises `LibraryError` if there is none, saying what to install."""
    for name in (ctypes.util.find_library("codec2"), "libcodec2.so.1.0", ctypes.util.find_library("lpcnetfreedv")):
        try:
            if name and hasattr(ctypes.CDLL(name), "lpcnet_freedv_create"):
                return name
        except OSError:
            continue
    raise LibraryError(
        "no library with LPCNet on this machine",
        "apt install libcodec2-1.0 (Debian 12; codec2 from 1.2 on is without it), or leave vocoders.lpcnet_codec2 out "
        "of the recipe",
    )


# The process of a clip, int16 in and out: it imports ctypes only, and starts in 15 ms.
_CODER = """
import ctypes, sys
codec2, frame = ctypes.CDLL(sys.argv[1]), int(sys.argv[2])
codec2.lpcnet_freedv_create.restype = ctypes.c_void_p
codec2.lpcnet_samples_per_frame.argtypes = codec2.lpcnet_bits_per_frame.argtypes = [ctypes.c_void_p]
codec2.lpcnet_enc.argtypes = codec2.lpcnet_dec.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_char_p]
coder = codec2.lpcnet_freedv_create(1)
if codec2.lpcnet_samples_per_frame(coder) != frame:
    sys.exit(f"its frames are not of {frame} samples")
bits = ctypes.create_string_buffer(codec2.lpcnet_bits_per_frame(coder))
samples = ctypes.create_string_buffer(2 * frame)
while block := sys.stdin.buffer.read(2 * frame):
    samples.raw = block
    codec2.lpcnet_enc(coder, samples, bits)
    codec2.lpcnet_dec(coder, bits, samples)
    sys.stdout.buffer.write(samples.raw)
"""

NEEDS = {"hifigan": (HifiGan.need,)}
LIBRARIES = {"hifigan": ("transformers",)}
OPTIONAL = {"lpcnet_codec2": lpcnet_library}
