"""Codecs: what transmission does to a wave; length and alignment are kept."""

from dataclasses import dataclass

import numpy as np

from speechdistill import audio
from speechdistill.degradations import Scene

_BITRATES_BPS = (6_000, 32_000)
_FRAME = audio.SAMPLE_RATE // 50
_DECODER_RATE = 48_000  # FFmpeg's libopus decoder has no other


@dataclass(frozen=True)
class Opus:
    """libopus and back, tuned for speech (`voip`), variable bit rate, 20 ms frames.

    `complexity` of 0..10 trades speed for quality; 5 is what WebRTC uses on phones. A wave above full scale
    is coded at full scale and brought back, since the speech coder works in 16 bits.
    """

    bitrate_bps: int
    complexity: int = 5

    def apply(self, wave: np.ndarray) -> np.ndarray:
        scale = np.float32(max(1.0, np.abs(wave).max()))
        decoded = _decoded(*self.encode(wave / scale))
        return audio.fit(audio.resample(decoded, _DECODER_RATE), len(wave)) * scale

    def encode(self, wave: np.ndarray) -> tuple[bytes, list[bytes]]:
        """The header (RFC 7845, section 5.1) and the packets of a wave within full scale."""
        import av

        encoder = av.CodecContext.create("libopus", "w")
        encoder.sample_rate, encoder.layout, encoder.format = audio.SAMPLE_RATE, "mono", "flt"
        encoder.bit_rate = self.bitrate_bps
        encoder.options = {"application": "voip", "compression_level": str(self.complexity)}
        encoder.open()
        packets = []
        for samples in _frames(wave):
            frame = av.AudioFrame.from_ndarray(samples, format="flt", layout="mono")
            frame.sample_rate = audio.SAMPLE_RATE
            packets += encoder.encode(frame)
        packets += encoder.encode(None)
        return bytes(encoder.extradata), [bytes(packet) for packet in packets]

    def clip_ids(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class BandLimit:
    """Everything above `cutoff_hz` removed, by a sample rate of twice that and back."""

    cutoff_hz: int = 4000

    def apply(self, wave: np.ndarray) -> np.ndarray:
        padded = np.pad(wave, (0, _FRAME))  # a single sample has no samples at the lower rate
        narrow = audio.resample(padded, audio.SAMPLE_RATE, 2 * self.cutoff_hz)
        return audio.fit(audio.resample(narrow, 2 * self.cutoff_hz), len(wave))

    def clip_ids(self) -> tuple[str, ...]:
        return ()


def opus(rng: np.random.Generator, scene: Scene) -> Opus:
    """Opus at 6..32 kb/s: from its lowest rate for speech to where wideband speech is transparent.

    Log-uniform, since quality changes with the ratio of rates: uniform rates would be mostly transparent.
    """
    return Opus(round(float(np.exp(rng.uniform(*np.log(_BITRATES_BPS))))))


def band_limit(rng: np.random.Generator, scene: Scene) -> BandLimit:
    """The 4 kHz band limit (Distill-MOS, section IV-B)."""
    return BandLimit()


def _frames(wave: np.ndarray) -> list[np.ndarray]:
    """20 ms frames, each (1, 320). The encoder adds one for its delay of 6.5 ms when it is flushed."""
    count = -(-len(wave) // _FRAME)
    return list(audio.fit(wave, count * _FRAME).astype(np.float32).reshape(count, 1, _FRAME))


def _decoded(header: bytes, packets: list[bytes]) -> np.ndarray:
    """Samples at 48 kHz; the decoder drops the delay that the header declares."""
    import av

    decoder = av.CodecContext.create("libopus", "r")
    decoder.sample_rate, decoder.layout, decoder.extradata = _DECODER_RATE, "mono", header
    to_float = av.AudioResampler(format="flt", layout="mono", rate=_DECODER_RATE)
    blocks = []
    for packet in [*map(av.Packet, packets), None]:
        for decoded in decoder.decode(packet):
            blocks += [frame.to_ndarray()[0] for frame in to_float.resample(decoded)]
    return np.concatenate(blocks)
