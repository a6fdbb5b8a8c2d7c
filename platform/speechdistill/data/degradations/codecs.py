"""Codecs, as used in transmission. Length and alignment stay the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from speechdistill.data import libopus
from speechdistill.data.degradation import Component, Neural, Scene
from speechdistill.io import audio
from speechdistill.io.assets import Need

_BITRATES_BPS = (6_000, 32_000)
_FRAME = audio.SAMPLE_RATE // 50
# Encoder and decoder of FFmpeg, sample rate in Hz, delay of the output in samples at that rate.
_TELEPHONE = {
    "g711_alaw": ("pcm_alaw", "pcm_alaw", 8_000, 0),
    "g711_ulaw": ("pcm_mulaw", "pcm_mulaw", 8_000, 0),
    "g722": ("g722", "g722", 16_000, 22),
    "amr_nb": ("libopencore_amrnb", "libopencore_amrnb", 8_000, 40),
}
_ENCODEC_KBPS = (1.5, 3.0, 6.0, 12.0, 24.0)
_AMR_BITRATES_BPS = (4_750, 5_150, 5_900, 6_700, 7_400, 7_950, 10_200, 12_200)


@dataclass(frozen=True)
class Opus:
    """Opus coding by libopus, tuned for speech (`voip`): variable bit rate, 20 ms frames.

    `complexity` of 0..10 trades speed for quality; WebRTC uses 5 on phones. The speech coder works in 16 bits, so a
    wave above full scale is scaled down for coding and scaled back.
    """

    bitrate_bps: int
    complexity: int = 5

    def apply(self, wave: np.ndarray) -> np.ndarray:
        scale = np.float32(max(1.0, np.abs(wave).max()))
        packets, late = self.encode(wave / scale)
        return audio.fit(libopus.decoded(packets)[late:], len(wave)) * scale

    def encode(self, wave: np.ndarray) -> tuple[list[bytes], int]:
        """Return the packets of a wave within full scale, and the delay of the decoded wave in samples."""
        return libopus.encoded(wave, self.bitrate_bps, self.complexity)

    def clip_ids(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class BandLimit:
    """Low-pass filter at `cutoff_hz`, by resampling to twice that rate and back."""

    cutoff_hz: int = 4000

    def apply(self, wave: np.ndarray) -> np.ndarray:
        padded = np.pad(wave, (0, _FRAME))  # a single sample would have no samples at the lower rate
        narrow = audio.resample(padded, audio.SAMPLE_RATE, 2 * self.cutoff_hz)
        return audio.fit(audio.resample(narrow, 2 * self.cutoff_hz), len(wave))

    def clip_ids(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class Telephone:
    """Telephone codec: `g711_alaw`, `g711_ulaw` and `amr_nb` at 8 kHz, `g722` at 16 kHz.

    `bitrate_bps` is 64,000, or one of the eight modes of AMR-NB from 4,750 to 12,200. A wave above full scale is scaled
    down for coding and scaled back.
    """

    codec: str
    bitrate_bps: int = 64_000

    def __post_init__(self) -> None:
        if self.codec not in _TELEPHONE:
            raise ValueError(f"codec {self.codec!r} is unknown; choose from {list(_TELEPHONE)}")
        if self.bitrate_bps not in (_AMR_BITRATES_BPS if self.codec == "amr_nb" else (64_000,)):
            raise ValueError(f"{self}: no such mode; choose from {_AMR_BITRATES_BPS} for AMR-NB, 64000 for others")

    def apply(self, wave: np.ndarray) -> np.ndarray:
        encoder, decoder, rate, delay = _TELEPHONE[self.codec]
        scale = np.float32(max(1.0, np.abs(wave).max(initial=0.0)))
        # The additional frame flushes the delayed samples, and makes a single sample long enough.
        padded = audio.fit(wave / scale, len(wave) + _FRAME)
        pcm = audio.quantise(audio.resample(padded, audio.SAMPLE_RATE, rate))
        decoded = _through(pcm, encoder, decoder, rate, self.bitrate_bps)[delay:]
        return audio.fit(audio.resample(decoded, rate), len(wave)) * scale

    def clip_ids(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class EnCodec(Neural):
    """EnCodec (Défossez et al. 2023) at one of the bandwidths that the model was trained for, in kb/s."""

    need: ClassVar[Need] = Need(
        "encodec",
        "the folder of the EnCodec model at 24 kHz, in the format of transformers",
        "https://huggingface.co/facebook/encodec_24khz",
        "MIT for the code; the model card names none",
        ("config.json", "model.safetensors"),
        hub="facebook/encodec_24khz",
        every=True,
    )

    bandwidth_kbps: float

    @classmethod
    def load(cls, path: Path, device: str) -> Any:
        from transformers import EncodecModel

        loaded: Any = EncodecModel.from_pretrained(path, local_files_only=True, output_loading_info=True)
        network, found = loaded
        if found["missing_keys"]:  # from_pretrained draws these at random
            raise ValueError(f"the weights {sorted(found['missing_keys'])[:3]} are missing")
        if network.config.audio_channels != 1 or network.config.normalize:
            raise ValueError("the model is for music in stereo")
        return network.eval().requires_grad_(False).to(device)

    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        import torch

        rate = network.config.sampling_rate
        inputs = np.stack([audio.resample(wave, audio.SAMPLE_RATE, rate) for wave in waves])
        tensors = torch.from_numpy(inputs)[:, None].to(network.device)
        # Encoded one by one: rounding depends on the batch and would sometimes choose another code.
        encoded = [network.encode(tensor[None], bandwidth=self.bandwidth_kbps) for tensor in tensors]
        codes = torch.cat([one.audio_codes for one in encoded], dim=1)  # (chunks, batch, codebooks, frames)
        decoded = network.decode(codes, [None]).audio_values[:, 0].cpu().numpy()
        return np.stack([audio.fit(audio.resample(wave, rate), waves.shape[1]) for wave in decoded])


def _draw_opus(rng: np.random.Generator, scene: Scene) -> Opus:
    """Draw Opus at 6..32 kb/s: from its lowest rate for speech to transparent wideband speech.

    Log-uniform, since quality changes with the ratio of rates: uniform rates would be mostly transparent.
    """
    return Opus(round(float(np.exp(rng.uniform(*np.log(_BITRATES_BPS))))))


def _draw_band_limit(rng: np.random.Generator, scene: Scene) -> BandLimit:
    """Return the 4 kHz band limit (Distill-MOS, section IV-B)."""
    return BandLimit()


def _draw_encodec(rng: np.random.Generator, scene: Scene) -> EnCodec:
    """Draw one of the model's bandwidths, 1.5 to 24 kb/s."""
    return EnCodec(*scene.assets[EnCodec.need.name], float(rng.choice(_ENCODEC_KBPS)))


def _draw_g711(rng: np.random.Generator, scene: Scene) -> Telephone:
    """Draw A-law or mu-law, with equal probability."""
    return Telephone("g711_alaw" if rng.random() < 0.5 else "g711_ulaw")


def _draw_g722(rng: np.random.Generator, scene: Scene) -> Telephone:
    """Return G.722 at 64 kb/s."""
    return Telephone("g722")


def _draw_amr_nb(rng: np.random.Generator, scene: Scene) -> Telephone:
    """Draw one of the eight modes of AMR-NB."""
    return Telephone("amr_nb", int(rng.choice(_AMR_BITRATES_BPS)))


opus = Component(_draw_opus, Opus)
band_limit = Component(_draw_band_limit, BandLimit)
encodec = Component(_draw_encodec, EnCodec, needs=(EnCodec.need,), libraries=("transformers",))
g711 = Component(_draw_g711, Telephone)
g722 = Component(_draw_g722, Telephone)
amr_nb = Component(_draw_amr_nb, Telephone)


def _through(pcm: np.ndarray, encoder: str, decoder: str, rate: int, bitrate_bps: int) -> np.ndarray:
    """Code and decode int16 samples; returns float32 samples at the same rate, at least as many."""
    import av

    coder = av.CodecContext.create(encoder, "w")
    coder.sample_rate, coder.layout, coder.format, coder.bit_rate = rate, "mono", "s16", bitrate_bps
    coder.open()
    frame = coder.frame_size or rate // 50
    packets = []
    for samples in audio.fit(pcm, -(-len(pcm) // frame) * frame).reshape(-1, 1, frame):
        block = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
        block.sample_rate = rate
        packets += coder.encode(block)
    packets += coder.encode(None)
    reader = av.CodecContext.create(decoder, "r")
    reader.sample_rate, reader.layout = rate, "mono"
    blocks = [out.to_ndarray()[0] for packet in [*packets, None] for out in reader.decode(packet)]
    return np.asarray(np.concatenate(blocks), np.float32) / 32768
