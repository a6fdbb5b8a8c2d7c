"""Speech over a network that loses packets: Opus as calls use it; length and alignment are kept.

libopus itself, which `av` brings: FFmpeg neither makes up for lost packets nor decodes the repair data of others.
"""

import ctypes
import ctypes.util
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from speechdistill import audio
from speechdistill.degradations import Scene

_FRAME = audio.SAMPLE_RATE // 50
_MOST_BYTES = 1275  # of a packet with one frame (RFC 6716, section 3.4)
# opus_defines.h
_VOIP = 2048
_SET_BITRATE, _SET_COMPLEXITY, _SET_FEC, _SET_EXPECTED_LOSS, _GET_LOOKAHEAD = 4002, 4010, 4012, 4014, 4027

_LOSS = (0.01, 0.2)
_MEAN_BURST = (2.0, 6.0)  # packets
_BITRATES_BPS = (16_000, 32_000)  # below, libopus leaves the repair data out


@dataclass(frozen=True)
class OpusLoss:
    """Opus in 20 ms packets of which a share of `loss` does not arrive; the decoder makes up for them.

    Lost packets come in bursts of `mean_burst` packets on average (Gilbert's model, the Gilbert-Elliott one whose bad
    state loses all); `1 / (1 - loss)` makes them independent of each other. With `fec` each packet repeats the one
    before it at a lower rate, which repairs a single loss. `seed` decides which packets are lost. A wave above full
    scale is coded at full scale and brought back.
    """

    bitrate_bps: int
    loss: float
    mean_burst: float
    fec: bool
    seed: int
    complexity: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.loss < 1 or self.mean_burst < max(1.0, self.loss / (1 - self.loss)):
            raise ValueError(f"{self}: no such losses; a burst is at least 1 and loss / (1 - loss) packets on average")

    def apply(self, wave: np.ndarray) -> np.ndarray:
        scale = np.float32(max(1.0, np.abs(wave).max(initial=0.0)))
        packets, lookahead = self.encode(wave / scale)
        decoded = _decoded(packets, self.arrives(len(packets)), self.fec)
        return audio.fit(decoded[lookahead:], len(wave)) * scale

    def arrives(self, num_packets: int) -> np.ndarray:
        """Which packets are not lost, shape (num_packets,)."""
        draws = np.random.default_rng(self.seed).random(num_packets + 1)
        recovers = 1 / self.mean_burst
        fails = self.loss * recovers / (1 - self.loss)
        good = np.empty(num_packets, bool)
        state = draws[-1] >= self.loss
        for i in range(num_packets):
            good[i] = state
            state = draws[i] >= fails if state else draws[i] < recovers
        return good

    def encode(self, wave: np.ndarray) -> tuple[list[bytes], int]:
        """The packets of a wave within full scale, and by how many samples what they decode to comes late."""
        opus, error = _libopus(), ctypes.c_int()
        encoder = ctypes.c_void_p(opus.opus_encoder_create(audio.SAMPLE_RATE, 1, _VOIP, ctypes.byref(error)))
        if error.value:
            raise RuntimeError(f"libopus makes no encoder (error {error.value})")
        try:
            for setting, value in (
                (_SET_BITRATE, self.bitrate_bps),
                (_SET_COMPLEXITY, self.complexity),
                (_SET_FEC, int(self.fec)),
                (_SET_EXPECTED_LOSS, round(100 * self.loss)),
            ):
                if opus.opus_encoder_ctl(encoder, setting, ctypes.c_int(value)):
                    raise ValueError(f"{self}: libopus refuses {value} for its setting {setting}")
            lookahead = ctypes.c_int()
            opus.opus_encoder_ctl(encoder, _GET_LOOKAHEAD, ctypes.byref(lookahead))
            buffer = ctypes.create_string_buffer(_MOST_BYTES)
            packets = []
            for frame in _frames(wave, lookahead.value):
                size = opus.opus_encode_float(encoder, _floats(frame), _FRAME, buffer, _MOST_BYTES)
                if size < 0:
                    raise RuntimeError(f"libopus cannot code a frame (error {size})")
                packets.append(buffer.raw[:size])
            return packets, lookahead.value
        finally:
            opus.opus_encoder_destroy(encoder)

    def clip_ids(self) -> tuple[str, ...]:
        return ()


def opus_loss(rng: np.random.Generator, scene: Scene) -> OpusLoss:
    """1 to 20% lost, log-uniform; independently or in bursts of 2 to 6 packets on average, and with FEC or without it,
    with equal probability; 16 to 32 kb/s, log-uniform."""
    loss = float(np.exp(rng.uniform(*np.log(_LOSS))))
    burst = float(rng.uniform(*_MEAN_BURST)) if rng.random() < 0.5 else 1 / (1 - loss)
    bitrate = round(float(np.exp(rng.uniform(*np.log(_BITRATES_BPS)))))
    return OpusLoss(bitrate, loss, burst, bool(rng.random() < 0.5), int(rng.integers(1 << 32)))


def _frames(wave: np.ndarray, lookahead: int) -> np.ndarray:
    """(frames, 320), with silence at the end so that the last sample comes out."""
    count = -(-(len(wave) + lookahead) // _FRAME)
    return np.ascontiguousarray(audio.fit(wave, count * _FRAME), np.float32).reshape(count, _FRAME)


def _decoded(packets: list[bytes], arrives: np.ndarray, fec: bool) -> np.ndarray:
    opus, error = _libopus(), ctypes.c_int()
    decoder = ctypes.c_void_p(opus.opus_decoder_create(audio.SAMPLE_RATE, 1, ctypes.byref(error)))
    if error.value:
        raise RuntimeError(f"libopus makes no decoder (error {error.value})")
    wave = np.zeros((len(packets), _FRAME), np.float32)
    try:
        for i, packet in enumerate(packets):
            repairs = 0
            if not arrives[i]:
                repairs = int(fec and i + 1 < len(packets) and arrives[i + 1])
                packet = packets[i + 1] if repairs else b""
            size = opus.opus_decode_float(decoder, packet or None, len(packet), _floats(wave[i]), _FRAME, repairs)
            if size != _FRAME:
                raise RuntimeError(f"libopus cannot decode packet {i} ({size} samples)")
    finally:
        opus.opus_decoder_destroy(decoder)
    return wave.reshape(-1)


def _floats(frame: np.ndarray) -> "ctypes._Pointer[ctypes.c_float]":
    return frame.ctypes.data_as(ctypes.POINTER(ctypes.c_float))


@lru_cache(maxsize=1)
def _libopus() -> ctypes.CDLL:
    import av

    assert av.__file__
    package = Path(av.__file__).parent
    bundled = sorted([*package.parent.glob("av.libs/libopus*"), *package.glob(".dylibs/libopus*")])
    name = str(bundled[0]) if bundled else ctypes.util.find_library("opus")
    if name is None:
        raise ImportError(
            "libopus is neither in the installed av nor on this machine; install the wheel of av, or libopus"
        )
    opus = ctypes.CDLL(name)
    opus.opus_encoder_create.restype = opus.opus_decoder_create.restype = ctypes.c_void_p
    opus.opus_encoder_ctl.argtypes = [ctypes.c_void_p, ctypes.c_int]  # variadic: on some machines passed otherwise
    return opus
