"""Opus at 16 kHz in 20 ms packets, by the libopus in the package `av`.

Not by FFmpeg, which neither conceals lost packets nor decodes repair data, and decodes at 48 kHz only: with resampling
to 16 kHz that takes four times as long.
"""

import ctypes
import ctypes.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from speechdistill.io import audio
from speechdistill.io.errors import LibraryError

_FRAME = audio.SAMPLE_RATE // 50
_MOST_BYTES = 1275  # largest packet with one frame (RFC 6716, section 3.4)
# opus_defines.h
_VOIP = 2048
_SET_BITRATE, _SET_COMPLEXITY, _SET_FEC, _SET_EXPECTED_LOSS, _GET_LOOKAHEAD = 4002, 4010, 4012, 4014, 4027


def encoded(
    wave: np.ndarray, bitrate_bps: int, complexity: int, fec: bool = False, loss: float = 0.0
) -> tuple[list[bytes], int]:
    """Return the packets of a wave within full scale, and the delay of the decoded wave in samples.

    The coder is tuned for speech (`OPUS_APPLICATION_VOIP`), with variable bit rate. With `fec` packets repeat the
    previous one if the expected `loss` (0..1) justifies it. Raises `ValueError` for settings that libopus refuses.
    """
    opus, error = _libopus(), ctypes.c_int()
    encoder = opus.opus_encoder_create(audio.SAMPLE_RATE, 1, _VOIP, ctypes.byref(error))
    if error.value:
        raise RuntimeError(f"libopus cannot create an encoder (error {error.value})")
    try:
        for setting, value in (
            (_SET_BITRATE, bitrate_bps),
            (_SET_COMPLEXITY, complexity),
            (_SET_FEC, int(fec)),
            (_SET_EXPECTED_LOSS, round(100 * loss)),
        ):
            if opus.opus_encoder_ctl(encoder, setting, ctypes.c_int(value)):
                raise ValueError(f"libopus refuses {value} for setting {setting}")
        lookahead = ctypes.c_int()
        opus.opus_encoder_ctl(encoder, _GET_LOOKAHEAD, ctypes.byref(lookahead))
        return _packets(encoder, wave, lookahead.value), lookahead.value
    finally:
        opus.opus_encoder_destroy(encoder)


def decoded(packets: Sequence[bytes], arrives: np.ndarray | None = None, fec: bool = False) -> np.ndarray:
    """Decode packets to float32 samples at 16 kHz, 320 for each.

    Packets with false in `arrives`, shape (packets,), are concealed, or with `fec` repaired from the next packet if
    that arrives.
    """
    opus, error = _libopus(), ctypes.c_int()
    decoder = opus.opus_decoder_create(audio.SAMPLE_RATE, 1, ctypes.byref(error))
    if error.value:
        raise RuntimeError(f"libopus cannot create a decoder (error {error.value})")
    wave = np.zeros((len(packets), _FRAME), np.float32)
    try:
        for i, packet in enumerate(packets):
            repairs = 0
            if arrives is not None and not arrives[i]:
                repairs = int(fec and i + 1 < len(packets) and arrives[i + 1])
                packet = packets[i + 1] if repairs else b""
            address = wave.ctypes.data + i * wave.strides[0]
            size = opus.opus_decode_float(decoder, packet or None, len(packet), address, _FRAME, repairs)
            if size != _FRAME:
                raise RuntimeError(f"libopus cannot decode packet {i} ({size} samples)")
    finally:
        opus.opus_decoder_destroy(decoder)
    return wave.reshape(-1)


def _packets(encoder: int, wave: np.ndarray, lookahead: int) -> list[bytes]:
    count = -(-(len(wave) + lookahead) // _FRAME)  # padded with silence, which flushes the last sample
    padded = np.ascontiguousarray(audio.fit(wave, count * _FRAME), np.float32)
    buffer = ctypes.create_string_buffer(_MOST_BYTES)
    packets = []
    for address in range(padded.ctypes.data, padded.ctypes.data + padded.nbytes, 4 * _FRAME):
        size = _libopus().opus_encode_float(encoder, address, _FRAME, buffer, _MOST_BYTES)
        if size < 0:
            raise RuntimeError(f"libopus cannot code a frame (error {size})")
        packets.append(ctypes.string_at(buffer, size))
    return packets


@lru_cache(maxsize=1)
def _libopus() -> ctypes.CDLL:
    import av

    assert av.__file__
    package = Path(av.__file__).parent
    bundled = sorted([*package.parent.glob("av.libs/libopus*"), *package.glob(".dylibs/libopus*")])
    name = str(bundled[0]) if bundled else ctypes.util.find_library("opus")
    if name is None:
        raise LibraryError(
            "libopus is neither in the installed av nor on this machine", "install the wheel of av, or libopus"
        )
    opus = ctypes.CDLL(name)
    pointer, number = ctypes.c_void_p, ctypes.c_int
    opus.opus_encoder_create.restype = opus.opus_decoder_create.restype = pointer
    opus.opus_encoder_destroy.argtypes = opus.opus_decoder_destroy.argtypes = [pointer]
    opus.opus_encoder_ctl.argtypes = [pointer, number]  # variadic arguments, which some ABIs pass differently
    opus.opus_encode_float.argtypes = [pointer, pointer, number, pointer, number]
    opus.opus_decode_float.argtypes = [pointer, ctypes.c_char_p, number, pointer, number, number]
    return opus
