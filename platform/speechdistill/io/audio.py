"""Audio input and output: decode, resample, encode.

Waves inside the platform are mono float32 at 16 kHz; stored samples are int16. Files are read by `audio_files.py`.
"""

import logging
import tempfile
from collections.abc import Iterable, Iterator
from io import BytesIO
from itertools import chain
from math import gcd

import av
import numpy as np
import soundfile
import soxr

from speechdistill.io.audio_decoders import opened
from speechdistill.io.audio_files import SAMPLE_RATE, Info
from speechdistill.io.errors import AudioError, UnreadableError

_LOG = logging.getLogger(__name__)
MIN_DURATION_S = 0.1  # of speech: shorter clips cannot be scored
SEGMENT_S = 7.68
"""Length of the student's input and of the teacher's centre crop: 384 frames of 20 ms."""

__all__ = [
    "EXTENSIONS",
    "MIN_DURATION_S",
    "SAMPLE_RATE",
    "SEGMENT_S",
    "AudioError",
    "Info",
    "UnreadableError",
    "codec_versions",
    "decode",
    "encode",
    "fit",
    "load",
    "load_middle",
    "num_samples",
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
_CANCELLED = 1e-2  # of the loudest channel's power: opposite polarities whose amplitudes differ by less than a tenth


def probe(uri: str) -> Info:
    """Return length, rate and channels of a local file or fsspec URL; raises `AudioError` if it is unusable.

    The length equals that of decoding: `len(load(uri)) == probe(uri).num_samples` for every format. Formats whose
    header can be checked against the size of the file (WAV, FLAC, ...) are not decoded.
    """
    with opened(uri) as recordings:
        info = Info(recordings.num_frames(), recordings.sample_rate, recordings.channels)
        if info.num_samples <= 0:
            raise _empty(uri)
        return info


def load(uri: str, start: int = 0, num_samples: int | None = None, channel: int | None = None) -> np.ndarray:
    """Decode to mono 16 kHz float32, shape (num_samples,); not clipped to [-1, 1].

    `start` and `num_samples` count samples at 16 kHz. Only that section is decoded if the format can seek, and it
    equals that section of the whole file. (AAC, AC-3, WMA and low-rate Opus decoders add noise, which differs by 1e-2,
    and after a pause in Matroska a section may be 2 ms off. Equal calls return equal bits.) Channels are averaged, or
    `channel` selects one (impulse responses must not be averaged). If channels cancel each other, the loudest is used,
    with a warning. Waves longer than 10 minutes are a read-only memory map of an unlinked temporary file. Raises
    `AudioError` for a file that is missing, corrupt, truncated, empty, absurd or not finite, and for a section or
    channel that the file does not have.
    """
    wave, loudest = _decoded(uri, start, num_samples, channel)
    if loudest is not None:
        _LOG.warning("%s: its channels cancel each other; only channel %d, the loudest, is used", uri, loudest)
        wave, _ = _decoded(uri, start, num_samples, loudest)
    return wave


def load_middle(uri: str, length: int, most: int) -> np.ndarray:
    """Load at most `most` samples from the middle of a file of `length` samples at 16 kHz."""
    return load(uri, max(0, length - most) // 2, min(most, length))


def num_samples(durations_s: np.ndarray) -> np.ndarray:
    """Return the lengths at 16 kHz, int64, of the waves that `load` returns, from a manifest's durations in seconds."""
    return np.floor(durations_s * SAMPLE_RATE + 1e-6).astype(np.int64)  # the quotient may be a bit below the integer


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
    """Convert float32 to int16, the precision in which samples are stored and scored; clips outside [-1, 1)."""
    return np.clip(np.rint(wave * 32768.0), -32768, 32767).astype(np.int16)


def encode(pcm: np.ndarray, audio_format: str) -> bytes:
    """Encode int16 samples at 16 kHz as the bytes of a shard's `audio` column: `flac` or `pcm16` (little endian)."""
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
    """Decode the bytes of `encode` to float32 in [-1, 1), shape (num_samples,); raises `AudioError` if corrupt.

    With `start` and `num_samples` only that section is decoded; it may be shorter at the end of the samples.
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
        raise AudioError(
            "audio column", f"not {audio_format} ({error})", "delete the shard and rerun the command that wrote it"
        ) from error
    return pcm.astype(np.float32) / np.float32(32768.0)


def codec_versions() -> dict[str, str]:
    """Return the library versions that affect decoded, resampled and coded bits; part of a run's fingerprint."""
    return {
        "libsndfile": soundfile.__libsndfile_version__,
        "soxr": f"{soxr.__version__}/{soxr.__libsoxr_version__}",
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
    }


def _decoded(uri: str, start: int, num_samples: int | None, channel: int | None) -> tuple[np.ndarray, int | None]:
    """Return the wave, and the channel to use instead if the channels cancel each other."""
    with opened(uri) as recordings:
        rate, channels = recordings.sample_rate, recordings.channels
        if channel is not None and not 0 <= channel < channels:
            raise AudioError(uri, f"it has no channel {channel}", f"choose one of 0..{channels - 1}")
        if start < 0 or (num_samples is not None and num_samples <= 0):
            raise _outside(uri, start, num_samples, recordings.num_frames() * SAMPLE_RATE // rate)
        begin, first, frames = _with_run_up(rate, start, num_samples)
        mixed = _Mixed(uri, recordings.blocks(first, frames), channel)
        wave = _gathered(_resampled(mixed, rate))
        end = (first + mixed.frames) * SAMPLE_RATE // rate  # of what was decoded
        wanted = end - start if num_samples is None else num_samples
        if start == end == 0:
            raise _empty(uri)
        if wanted <= 0 or start + wanted > end:
            raise _outside(uri, start, num_samples, recordings.num_frames() * SAMPLE_RATE // rate)
    return fit(wave[start - begin :], wanted), mixed.loudest_if_cancelled()


def _empty(uri: str) -> AudioError:
    return AudioError(uri, "no samples", "leave it out")


def _outside(uri: str, start: int, num_samples: int | None, held: int) -> AudioError:
    end = "the end" if num_samples is None else start + num_samples
    return AudioError(
        uri,
        f"samples {start}..{end} lie outside its {held} samples at 16 kHz",
        "choose a section inside it; if the file has changed, ingest it into a new manifest",
    )


def _with_run_up(rate: int, start: int, wanted: int | None) -> tuple[int, int, int | None]:
    """Return the sample at 16 kHz to decode from, its frame in the file, and the number of frames, None for all."""
    if rate == SAMPLE_RATE:
        return start, start, wanted
    run_up = _RUN_UP * SAMPLE_RATE // min(rate, SAMPLE_RATE)
    whole = SAMPLE_RATE // gcd(rate, SAMPLE_RATE)  # samples that coincide with a frame are this far apart
    begin = max(0, start - run_up) // whole * whole
    first = begin * rate // SAMPLE_RATE
    return begin, first, None if wanted is None else -(-(start + wanted + run_up) * rate // SAMPLE_RATE) - first


class _Mixed:
    """Blocks of one channel, `channel` or the average of all; counts frames and the power of each channel."""

    def __init__(self, uri: str, blocks: Iterator[np.ndarray], channel: int | None) -> None:
        self._uri, self._blocks, self._channel = uri, blocks, channel
        self.frames = 0
        self._power, self._powers = 0.0, np.zeros(1)

    def __iter__(self) -> Iterator[np.ndarray]:
        for block in self._blocks:
            channels = block.shape[1]
            # `mean` takes four times as long along so short an axis.
            mono = sum(block.T) / np.float32(channels) if self._channel is None else block[:, self._channel]
            if not np.isfinite(mono).all():
                raise AudioError(self._uri, "NaN or infinite samples", "repair or leave out the recording")
            if channels > 1 and self._channel is None:
                self._power += float(np.dot(mono, mono))
                self._powers = self._powers + np.einsum("fc,fc->c", block, block)
            self.frames += len(block)
            yield mono

    def loudest_if_cancelled(self) -> int | None:
        """Return the loudest channel if the average is 20 dB below it, which 32 unrelated channels do not reach."""
        return int(self._powers.argmax()) if self._power < _CANCELLED * self._powers.max() else None


def _resampled(blocks: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32") if rate != SAMPLE_RATE else None
    for mono in blocks:
        yield mono if stream is None else stream.resample_chunk(np.ascontiguousarray(mono))
    if stream is not None:
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)


def _gathered(chunks: Iterator[np.ndarray]) -> np.ndarray:
    held, length = [np.zeros(0, np.float32)], 0
    for chunk in chunks:
        held.append(chunk)
        length += len(chunk)
        if length > _SPOOL_SAMPLES:
            return _spooled(held, chunks)
    return np.concatenate(held)


def _spooled(held: list[np.ndarray], chunks: Iterator[np.ndarray]) -> np.ndarray:
    with tempfile.TemporaryFile() as file:
        for chunk in chain(held, chunks):
            file.write(chunk.tobytes())
        held.clear()
        file.flush()
        return np.memmap(file, dtype=np.float32, mode="r")
