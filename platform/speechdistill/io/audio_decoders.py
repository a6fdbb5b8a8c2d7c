"""Audio files as blocks of frames: what soundfile or PyAV reads, with its header and its length checked."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, islice
from typing import Any, Protocol

import av
import numpy as np
import soundfile

from speechdistill.io import audio_files
from speechdistill.io.audio_files import CONVERT, COPY, Info, Source, one_line
from speechdistill.io.errors import AudioError

MAX_DURATION_S = 24 * 3600.0
MAX_CHANNELS = 32
SAMPLE_RATES = range(1_000, 768_001)
BLOCK_FRAMES = 1 << 18
_Frame = tuple[int | None, np.ndarray]  # timestamp; block


class Reader(Protocol):
    info: Info

    def blocks(self, first: int, frames: int) -> Iterator[np.ndarray]:
        """float32 blocks, shape (frames, channels): `frames` in all, from frame `first`; or `AudioError`."""

    def close(self) -> None: ...


@contextmanager
def opened(uri: str) -> Iterator[Reader]:
    """The file's reader with its header checked; raises `AudioError`, also where the storage fails midway."""
    with audio_files.source(uri) as source:
        try:
            reader = _reader(uri, source)
            try:
                _check(uri, reader.info)
                yield reader
            finally:
                reader.close()
        except AudioError:
            source.raise_error()  # the cause
            raise
        source.raise_error()


def _reader(uri: str, source: Source) -> Reader:
    header = source.read(1024)
    source.seek(0)
    try:
        sound = _SoundFileReader(uri, source, header)
        if sound.knows_its_length(source):
            return sound
        sound.close()
        refusal = "length unknown"
    except soundfile.LibsndfileError as error:
        refusal = error.error_string.rstrip(".")
    try:
        return _AvReader(uri, source)
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        both = f"soundfile ({refusal}) or PyAV ({one_line(error)})"
        raise AudioError(uri, f"not audio that {both} can read", CONVERT) from error


def _check(uri: str, info: Info) -> None:
    absurd = None
    if info.sample_rate not in SAMPLE_RATES:
        absurd = f"sample rate {info.sample_rate} Hz is outside {SAMPLE_RATES[0]}..{SAMPLE_RATES[-1]} Hz"
    elif not 1 <= info.channels <= MAX_CHANNELS:
        absurd = f"{info.channels} channels, at most {MAX_CHANNELS} are accepted"
    elif info.duration_s > MAX_DURATION_S:
        absurd = f"{info.duration_s / 3600:.1f} h long, at most {MAX_DURATION_S / 3600:.0f} h are accepted"
    elif info.num_samples <= 0:
        raise AudioError(uri, "no samples", "leave it out")
    if absurd:
        raise AudioError(uri, absurd, CONVERT)


class _SoundFileReader:
    """What libsndfile reads: WAV, FLAC, Ogg, MP3, AIFF, AU, CAF, W64, ... with exact lengths and seeking."""

    def __init__(self, uri: str, source: Source, header: bytes) -> None:
        self._uri = uri
        self._sound = soundfile.SoundFile(source)
        self.info = Info(self._sound.frames, self._sound.samplerate, self._sound.channels)
        if missing := _missing(self._sound, header):
            self.close()
            fix = f"{COPY}, or rewrite its header (`ffmpeg -i IN OUT`)"
            raise AudioError(uri, f"truncated ({missing})", fix)

    def blocks(self, first: int, frames: int) -> Iterator[np.ndarray]:
        skip = first
        try:
            if self._sound.seekable():  # GSM 6.10 and some ADPCM are not
                skip = min(first, self._run_up(first))
                if first > skip:
                    self._sound.seek(first - skip)
            for block in self._read(skip + frames):
                yield block[skip:]
                skip = max(0, skip - len(block))
        except soundfile.LibsndfileError as error:
            raise AudioError(self._uri, f"corrupt ({error.error_string.rstrip('.')})", COPY) from error

    def _run_up(self, first: int) -> int:
        """Frames to decode before `first`, since lossy decoders carry state: MP3's reservoir reaches back 511 bytes."""
        near_end = self.info.num_frames - first < 10 * self.info.sample_rate
        if self._sound.subtype == "VORBIS" and near_end:  # libsndfile is some samples off after a seek to the last page
            return 10 * self.info.sample_rate
        return self.info.sample_rate if self._sound.format in ("MP3", "OGG") else 0

    def _read(self, left: int) -> Iterator[np.ndarray]:
        while left > 0:
            block = self._sound.read(min(left, BLOCK_FRAMES), dtype="float32", always_2d=True)
            if len(block) == 0:
                reason = f"truncated ({left} of {self.info.num_frames} frames are missing)"
                raise AudioError(self._uri, reason, COPY)
            left -= len(block)
            yield block

    def knows_its_length(self, source: Source) -> bool:
        """False for FLAC written to a pipe and for MP3 without a Xing tag (libsndfile guesses its length)."""
        if self._sound.format != "MP3":
            return bool(self._sound.frames < 1 << 62)
        here = source.tell()
        source.seek(0)
        id3 = source.read(10)
        size = sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(id3[6:10]))  # ID3v2.4, section 6.2
        source.seek(10 + size if id3.startswith(b"ID3") else 0)
        frame = source.read(4096)
        source.seek(here)
        return b"Xing" in frame or b"Info" in frame

    def close(self) -> None:
        self._sound.close()


_PROMISED = re.compile(r"^\s*(?:data|SSND|BODY|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_RF64 = re.compile(r"Calculated frame count (\d+) does not match value from 'ds64' chunk of (\d+)")
_NIST = re.compile(rb"^NIST_1A.*^sample_count -i (\d+)", re.MULTILINE | re.DOTALL)
_SOX_MARKER = 0x7FFFF000  # SoX's MS_UNSPEC, rounded down to whole frames


def _missing(sound: Any, header: bytes) -> str | None:
    """What the header promises beyond the end; libsndfile shortens such a file and only logs it."""
    log = sound.extra_info
    if match := _PROMISED.search(log):
        promised, held = map(int, match.groups())
        # Sizes that mean "written to a pipe, read to the end": FFmpeg's and SoX's.
        pipe = promised == 0xFFFFFFFF or 0 <= _SOX_MARKER - promised < 1024
        if promised > held and not pipe:
            return f"its header promises {promised} bytes of samples, the file holds {held}"
    if match := _RF64.search(log):
        return f"its header promises {match[2]} frames, the file holds {match[1]}"
    nist = _NIST.search(header)
    if nist and int(nist[1]) > sound.frames:
        return f"its header promises {int(nist[1])} frames, the file holds {sound.frames}"
    return None


class _AvReader:
    """What only FFmpeg reads (AAC, AMR, WMA, WebM, ...). Position 0 is the first sample that it decodes.

    Containers round lengths and count the codec's padding: the end is cut, or filled with `_SLACK_S` at most.
    """

    _PREROLL_S = 1.0  # decoders with memory need a run-up to a seek point (RFC 7845: 80 ms for Opus)
    _SLACK_S = 0.25
    _WITH_LENGTH = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "asf")  # others guess it from the bit rate

    def __init__(self, uri: str, source: Source) -> None:
        self._uri, self._source = uri, source
        self._reopen()
        context = self._stream.codec_context
        rate = context.sample_rate or 0
        self.info = Info(round(self._duration_s() * rate), rate, context.channels)

    def blocks(self, first: int, frames: int) -> Iterator[np.ndarray]:
        left, cause = frames, None
        try:
            for position, block in self._decoded(first):
                block = block[max(0, first - position) :][:left]
                left -= len(block)
                yield block
                if left == 0:
                    return
        except av.FFmpegError as error:  # harmless in a tag behind the last packet
            cause = error
        if left > self._SLACK_S * self.info.sample_rate or (first == 0 and left == frames):
            reason = f"corrupt ({one_line(cause)})" if cause else "truncated"
            raise AudioError(self._uri, f"{reason}, {left / self.info.sample_rate:.2f} s are missing", COPY)
        yield np.zeros((left, self.info.channels), np.float32)

    def close(self) -> None:
        self._container.close()

    def _reopen(self) -> None:
        self._source.seek(0)
        # A playlist must not make FFmpeg open other files or addresses.
        options = {"protocol_whitelist": "none"}
        self._container = av.open(self._source, options=options, metadata_errors="replace")
        if not self._container.streams.audio or self._container.streams.audio[0].codec_context is None:
            raise ValueError("no audio stream, or no decoder for it")
        self._stream = self._container.streams.audio[0]

    def _duration_s(self) -> float:
        stream, container = self._stream, self._container
        if container.format.name in self._WITH_LENGTH:
            if stream.duration:
                return float(stream.duration * stream.time_base)
            if container.duration:
                return float((container.duration - max(0, container.start_time or 0)) / av.time_base)
        return self._counted_s()

    def _counted_s(self) -> float:
        """The length by reading all packets, without decoding."""
        begin, end = None, 0
        for packet in self._container.demux(self._stream):
            if packet.size:
                begin = packet.pts if begin is None else begin
                end = (end if packet.pts is None else packet.pts) + (packet.duration or 0)
        self._container.close()
        self._reopen()
        return float((end - max(0, begin or 0)) * self._stream.time_base)

    def _decoded(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """Blocks with their positions, from one at or before `first`."""
        position, frames = 0, self._frames()
        opening = list(islice(frames, 2))
        frames = chain(opening, frames)
        if first > 2 * self._PREROLL_S * self.info.sample_rate and len(opening) == 2:
            sought = self._sought(first, opening)
            if sought is None:
                self._container.close()
                self._reopen()
            position, frames = sought or (0, self._frames())
        for _, block in frames:
            yield position, block
            position += len(block)

    def _frames(self) -> Iterator[_Frame]:
        """Frames from where the container stands."""
        planar = av.AudioResampler(format="fltp")
        for frame in self._container.decode(self._stream):
            if (frame.sample_rate, frame.layout.nb_channels) != (self.info.sample_rate, self.info.channels):
                raise AudioError(self._uri, "its sample rate or number of channels changes midway", CONVERT)
            for converted in planar.resample(frame):
                yield frame.pts, converted.to_ndarray().T

    def _sought(self, first: int, opening: list[_Frame]) -> tuple[int, Iterator[_Frame]] | None:
        """Position and frames after a seek to before `first`; None where the container cannot do it."""
        (origin, lead), (_, regular) = opening
        rate, base = self.info.sample_rate, self._stream.time_base
        if origin is None:
            return None
        try:
            self._container.seek(origin + int((first / rate - self._PREROLL_S) / base), stream=self._stream)
            frames = self._frames()
            _, (pts, block) = islice(frames, 2)  # some decoders drop a part of the first
        except (av.FFmpegError, ValueError):  # ValueError: fewer than two frames
            return None
        if pts is None:
            return None
        position = _on_grid((pts - origin) * base * rate, len(lead), len(regular), 2 * base * rate)
        return (position, chain([(pts, block)], frames)) if position <= first else None


def _on_grid(position: Fraction, lead: int, size: int, tolerance: Fraction) -> int:
    """The exact start of a frame from its timestamp, which WebM rounds to milliseconds."""
    if tolerance >= size / 4:  # ambiguous
        return round(position)
    nearest = lead + round((position - lead) / size) * size
    return nearest if abs(nearest - position) <= tolerance else round(position)
