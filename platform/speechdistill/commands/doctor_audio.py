"""Made-up voices, recordings and files for the trials of `speechdistill doctor`, and the trial of audio formats."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from speechdistill.data.clips import Clips
from speechdistill.io import audio, table
from speechdistill.io.audio import SAMPLE_RATE

# Suffix: libsndfile's format and subtype, or PyAV's container and encoder.
SOUNDFILE = {
    "wav": ("WAV", "PCM_16"),
    "flac": ("FLAC", "PCM_16"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "ogg": ("OGG", "VORBIS"),
    "opus": ("OGG", "OPUS"),
}
AV = {"m4a": ("mp4", "aac"), "webm": ("webm", "libopus"), "wma": ("asf", "wmav2")}


class Missing(Exception):
    """Something that a trial needs is not there: the reason, the fix."""


def format_trial(suffix: str) -> str:
    """Write a voice in the format and read it back; FLAC, the format of shards, must return the same bits."""
    wave = voice(2.0)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/voice.{suffix}"
        try:
            _write(wave, path, suffix)
        except Exception as error:
            raise Missing(f"no test file could be written ({error})", "score a file of your own to see") from error
        decoded = audio.load(path)
    likeness = _likeness(wave, decoded)
    if abs(len(decoded) - len(wave)) > 0.25 * SAMPLE_RATE or not likeness > 0.9:
        raise ArithmeticError(f"{len(wave)} samples came back as {len(decoded)}, correlation {likeness:.2f}")
    pcm = audio.quantise(wave)
    if suffix == "flac" and not np.array_equal(audio.quantise(audio.decode(audio.encode(pcm, "flac"), "flac")), pcm):
        raise ArithmeticError("samples do not survive encoding and decoding bit for bit")
    return f"written and read back, correlation {likeness:.3f}"


def _write(wave: np.ndarray, path: str, suffix: str) -> None:
    import av
    import soundfile

    if suffix in SOUNDFILE:
        file_format, subtype = SOUNDFILE[suffix]
        soundfile.write(path, wave, SAMPLE_RATE, format=file_format, subtype=subtype)
        return
    container, codec = AV[suffix]
    with av.open(path, "w", format=container) as file:
        stream = file.add_stream(codec, rate=SAMPLE_RATE, layout="mono")
        stream.bit_rate = 32_000
        frame = av.AudioFrame.from_ndarray(wave[None], "fltp", "mono")
        frame.sample_rate = SAMPLE_RATE
        file.mux([*stream.encode(frame), *stream.encode(None)])


def _likeness(first: np.ndarray, second: np.ndarray) -> float:
    """Return the largest normalised cross-correlation, which ignores a codec's delay and gain."""
    from scipy.signal import correlate

    scale = np.linalg.norm(first) * np.linalg.norm(second)
    return float(correlate(first, second, method="fft").max() / max(scale, 1e-9))


@contextmanager
def corpus() -> Iterator[tuple[Clips, Clips]]:
    """Yield manifests of made-up recordings: of speech alone, and of speech, noise and a room."""
    import soundfile

    rng = np.random.default_rng(0)
    decay = np.exp(-np.arange(4800) / 800) * rng.standard_normal(4800)
    waves = {"noise": 0.1 * rng.standard_normal(4 * SAMPLE_RATE), "rir": np.append(4.0, decay) / 8}
    waves |= {f"speech{i}": voice(2.0, pitch_hz=100.0 + 20 * i) for i in range(6)}
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for name, wave in waves.items():
            uri, kind = f"{folder}/{name}.wav", name.rstrip("0123456789")
            soundfile.write(uri, wave, SAMPLE_RATE)
            row = {"clip_id": name, "uri": uri, "kind": kind, "speaker": name, "duration_s": len(wave) / SAMPLE_RATE}
            rows.append({**row, "sample_rate": SAMPLE_RATE, "channels": 1})
        speech = [row for row in rows if row["kind"] == "speech"]
        yield Clips(table.from_rows(speech, "clip.v1")), Clips(table.from_rows(rows, "clip.v1"))


def voice(seconds: float, pitch_hz: float = 120.0) -> np.ndarray:
    """Return harmonics of a gliding pitch in syllables; float32 at 16 kHz, shape (num_samples,)."""
    t = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(pitch_hz + 20 * np.sin(2 * np.pi * 0.6 * t)) / SAMPLE_RATE
    tone = sum(np.sin(k * phase) / k for k in range(1, 20))
    return np.asarray(0.2 * tone * np.clip(np.sin(2 * np.pi * 3 * t), 0, 1), np.float32)
