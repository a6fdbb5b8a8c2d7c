"""Audio in and out: the one place that knows the sample rate.

Everything inside the platform is mono float32 at 16 kHz; what is stored is int16. Files and their formats are
`audio_files.py`.
"""

import tempfile
from collections.abc import Iterator
from io import BytesIO
from math import gcd

import av
import numpy as np
import soundfile
import soxr

from speechdistill.io.audio_decoders import Reader, opened
from speechdistill.io.audio_files import SAMPLE_RATE, Info
from speechdistill.io.errors import AudioError, UnreadableError

__all__ = [
    "EXTENSIONS",
    "SAMPLE_RATE",
    "AudioError",
    "Info",
    "UnreadableError",
    "codec_versions",
    "decode",
    "encode",
    "fit",
    "load",
    "probe",
    "quantise",
    "resample",
]

_SUFFIXES = (
    "3g2 3gp aac ac3 aif aifc aiff amr au awb caf flac gsm m4a m4b mka mkv mov mp2 mp3 mp4 mpga nist "
    "oga ogg opus rf64 snd sph tta voc w64 wav wave webm wma wv"
)
EXTENSIONS = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
"""Lower-case suffixes, with the dot, of the files that a search of folders takes for audio."""

_SPOOL_SAMPLES = 10 * 60 * SAMPLE_RATE  # longer waves live in an unlinked file, not in memory
# Samples of run-up with which a section equals that of the whole file to 1e-7 (measured, soxr HQ).
_RUN_UP = 256


def probe(uri: str) -> Info:
    """Read the header of a local file or fsspec URL; raises `AudioError` where it is unusable.

    `len(load(uri)) == probe(uri).num_samples` for every format.
    """
    with opened(uri) as reader:
        return reader.info


def load(uri: str, start: int = 0, num_samples: int | None = None, channel: int | None = None) -> np.ndarray:
    """Decode to mono 16 kHz float32, shape (num_samples,); not clipped to [-1, 1].

    `start` and `num_samples` count samples at 16 kHz. Only that section is decoded where the format can seek,
    and it equals that section of the whole file (AAC, AC-3, WMA and low-rate Opus decoders add noise of their
    own, which differs by 1e-2; the same call gives the same bits). Channels are averaged, or one is taken with
    `channel` (impulse responses must not be averaged). Waves above 10 minutes are a read-only memory map of an
    unlinked temporary file. Raises `AudioError` for a file that is missing, corrupt, truncated, empty, absurd
    or not finite, and for a section or channel that it does not have.
    """
    with opened(uri) as reader:
        info = reader.info
        wanted = info.num_samples - start if num_samples is None else num_samples
        if start < 0 or wanted <= 0 or start + wanted > info.num_samples:
            raise AudioError(
                uri,
                f"samples {start}..{start + wanted} lie outside its {info.num_samples} samples at 16 kHz",
                "choose a section inside it; if the file has changed, ingest it into a new manifest",
            )
        if channel is not None and not 0 <= channel < info.channels:
            raise AudioError(uri, f"it has no channel {channel}", f"choose one of 0..{info.channels - 1}")
        begin, first, frames = _with_run_up(info, start, wanted)
        wave = _gathered(_resampled(uri, reader, first, frames, channel), start - begin + wanted)
        return fit(wave[start - begin :], wanted)


def fit(wave: np.ndarray, num_samples: int) -> np.ndarray:
    """Crop or zero-pad the end to exactly `num_samples`."""
    if len(wave) >= num_samples:
        return wave[:num_samples]
    return np.pad(wave, (0, num_samples - len(wave)))


def resample(wave: np.ndarray, sample_rate: int, target_rate: int = SAMPLE_RATE) -> np.ndarray:
    """Resample a mono wave, shape (n,), with soxr's HQ filter (linear phase, no delay); float32."""
    if sample_rate == target_rate:
        return wave
    return np.asarray(soxr.resample(wave, sample_rate, target_rate), dtype=np.float32)


def quantise(wave: np.ndarray) -> np.ndarray:
    """float32 to int16, the precision in which samples are stored and scored; clips outside [-1, 1)."""
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def encode(pcm: np.ndarray, audio_format: str) -> bytes:
    """int16 samples at 16 kHz to the bytes of a shard's `audio` column: `flac` or `pcm16` (little endian)."""
    if pcm.dtype != np.int16 or pcm.ndim != 1:
        raise TypeError(f"int16 samples of shape (n,) expected, not {pcm.dtype} {pcm.shape}: quantise first")
    if audio_format == "pcm16":
        return pcm.astype("<i2").tobytes()
    if audio_format == "flac":
        buffer = BytesIO()
        soundfile.write(buffer, pcm, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
        return buffer.getvalue()
    raise ValueError(f"audio format {audio_format!r}: choose flac or pcm16")


def decode(data: bytes, audio_format: str, start: int = 0, num_samples: int | None = None) -> np.ndarray:
    """The inverse of `encode`: float32 in [-1, 1), shape (num_samples,); raises `AudioError` if corrupt.

    With `start` and `num_samples` only that section is decoded; it ends where the samples do.
    """
    if audio_format not in ("flac", "pcm16"):
        raise ValueError(f"audio format {audio_format!r}: choose flac or pcm16")
    try:
        if not data:  # a FLAC file of no samples is no bytes
            pcm = np.zeros(0, np.int16)
        elif audio_format == "flac":
            frames = -1 if num_samples is None else num_samples
            pcm, _ = soundfile.read(BytesIO(data), frames, start, dtype="int16")
        else:
            pcm = np.frombuffer(data, dtype="<i2")[start:][:num_samples]
    except (soundfile.LibsndfileError, ValueError) as error:
        raise AudioError("audio column", f"not {audio_format} ({error})", "make the shard again") from error
    return pcm.astype(np.float32) / np.float32(32768.0)


def codec_versions() -> dict[str, str]:
    """Versions that decide the bits of decoded, resampled and coded audio; part of a run's fingerprint."""
    return {
        "libsndfile": soundfile.__libsndfile_version__,
        "soxr": f"{soxr.__version__}/{soxr.__libsoxr_version__}",
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
    }


def _with_run_up(info: Info, start: int, wanted: int) -> tuple[int, int, int]:
    """For a section in samples at 16 kHz: the sample to decode from, its frame, and how many frames."""
    rate = info.sample_rate
    if rate == SAMPLE_RATE:
        return start, start, wanted
    run_up = _RUN_UP * SAMPLE_RATE // min(rate, SAMPLE_RATE)
    whole = SAMPLE_RATE // gcd(rate, SAMPLE_RATE)  # only every so many samples does one start with a frame
    begin = max(0, start - run_up) // whole * whole
    first = begin * rate // SAMPLE_RATE
    end = -(-(start + wanted + run_up) * rate // SAMPLE_RATE)
    return begin, first, min(end, info.num_frames) - first


def _resampled(uri: str, reader: Reader, first: int, frames: int, channel: int | None) -> Iterator[np.ndarray]:
    rate = reader.info.sample_rate
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
    for block in reader.blocks(first, frames):
        # Not `mean`, which along so short an axis takes four times as long.
        mono = sum(block.T) / np.float32(reader.info.channels) if channel is None else block[:, channel]
        if not np.isfinite(mono).all():
            raise AudioError(uri, "NaN or infinite samples", "repair or leave out the recording")
        yield mono if stream is None else stream.resample_chunk(np.ascontiguousarray(mono))
    if stream is not None:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _gathered(chunks: Iterator[np.ndarray], expected: int) -> np.ndarray:
    if expected <= _SPOOL_SAMPLES:
        return np.concatenate([np.zeros(0, np.float32), *chunks])
    with tempfile.TemporaryFile() as file:
        for chunk in chunks:
            file.write(chunk.tobytes())
        file.flush()
        return np.memmap(file, dtype=np.float32, mode="r")
