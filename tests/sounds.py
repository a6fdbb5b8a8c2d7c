"""Audio files made for tests, and the check that all of a file is read."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from speechdistill.io.audio import SAMPLE_RATE, load, probe


def tone(duration_s: float, pitch: float = 300.0, rate: int = SAMPLE_RATE) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * pitch * np.arange(round(duration_s * rate)) / rate)).astype(np.float32)


def coded(wave: np.ndarray, form: str, subtype: str | None = None, rate: int = SAMPLE_RATE) -> bytes:
    data = io.BytesIO()
    soundfile.write(data, wave, rate, format=form, subtype=subtype)
    return data.getvalue()


def muxed(form: str, codec: str, wave: np.ndarray, rate: int, options: dict[str, str] | None = None) -> bytes:
    return film(form, codec, [(0.0, wave)], rate, picture_s=0.0, options=options)


def film(
    form: str,
    codec: str,
    parts: list[tuple[float, np.ndarray]],
    rate: int,
    picture_s: float,
    options: dict[str, str] | None = None,
) -> bytes:
    """A container whose audio has `parts`, each from its own second on, and a picture of `picture_s`."""
    data = io.BytesIO()
    with av.open(data, "w", format=form, options=options or {}) as container:
        sound = container.add_stream(codec, rate=rate, layout="mono", bit_rate=64_000)
        if picture_s:
            picture = container.add_stream("mpeg4", rate=10)
            picture.width = picture.height = 16
            for number in range(round(10 * picture_s)):
                image = av.VideoFrame(16, 16, "yuv420p")
                image.pts, image.time_base = number, Fraction(1, 10)
                container.mux(picture.encode(image))
            container.mux(picture.encode())
        for start_s, wave in parts:
            frame = av.AudioFrame.from_ndarray(wave[None], "fltp", "mono")
            frame.rate, frame.pts, frame.time_base = rate, round(start_s * rate), Fraction(1, rate)
            for resampled in av.AudioResampler(sound.format, "mono", rate).resample(frame):
                container.mux(sound.encode(resampled))
        container.mux(sound.encode())
    return data.getvalue()


def wav(data: bytes, size: int, form: int = 1) -> bytes:
    fmt = struct.pack("<HHIIHH", form, 1, SAMPLE_RATE, 2 * SAMPLE_RATE, 2, 16)
    riff = struct.pack("<4sI4s4sI", b"RIFF", min(size + 36, 0xFFFFFFFF), b"WAVE", b"fmt ", 16)
    return riff + fmt + b"data" + struct.pack("<I", size) + data


def agrees(path: str, duration_s: float, tolerance_s: float = 0.001) -> np.ndarray:
    """The whole wave, which has the length that the probe says and that is expected, as its sections have."""
    whole = load(path)
    info = probe(path)
    planned = int(np.floor(info.duration_s * SAMPLE_RATE + 1e-6))  # from the manifest, as plans and training crop
    assert len(whole) == info.num_samples == planned
    assert len(whole) / SAMPLE_RATE == pytest.approx(duration_s, abs=tolerance_s)
    start = max(0, len(whole) - SAMPLE_RATE)
    np.testing.assert_allclose(load(path, start, len(whole) - start), whole[start:], atol=0.01)
    return whole


def in_all_formats(duration_s: float) -> dict[str, bytes]:
    """A tone in each format, by the name that a refusal has for it; a `-` introduces a variant."""
    wave, wide = tone(duration_s), tone(duration_s, rate=48_000)
    bare = {"write_xing": "0", "id3v2_version": "0"}
    forms = {"WAV": "WAV", "WAV-rf64": "RF64", "AIFF": "AIFF", "AU": "AU", "CAF": "CAF", "W64": "W64", "VOC": "VOC"}
    return {
        **{name: coded(wave, form, "PCM_16") for name, form in forms.items()},
        "NIST": coded(wave, "NIST", "PCM_16"),
        "FLAC": coded(wave, "FLAC"),
        "Ogg": coded(wave, "OGG", "VORBIS"),
        "Ogg-opus": coded(wave, "OGG", "OPUS"),
        "MP3": muxed("mp3", "libmp3lame", wave, SAMPLE_RATE),
        "MP3-bare": muxed("mp3", "libmp3lame", wave, SAMPLE_RATE, bare),
        "AAC": muxed("adts", "aac", wave, SAMPLE_RATE),
        "MP4": muxed("ipod", "aac", wave, SAMPLE_RATE),
        "Matroska": muxed("webm", "libopus", wide, 48_000),
        "ASF": muxed("asf", "wmav2", wave, SAMPLE_RATE),
    }
