"""Decode audio files to blocks of frames with soundfile or PyAV."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, pairwise, takewhile
from typing import Protocol

import av
import numpy as np
import soundfile

from speechdistill.io import audio_ends, audio_files, audio_marks, audio_streams
from speechdistill.io.audio_files import CONVERT, COPY, EXPORT, REWRITE, SPLIT, Source, one_line
from speechdistill.io.audio_pyav import AvReader
from speechdistill.io.audio_soundfile import SoundFileReader
from speechdistill.io.errors import AudioError

MAX_DURATION_S = 24 * 3600.0
MAX_CHANNELS = 32
SAMPLE_RATES = range(1_000, 768_001)
_NO_AUDIO = {
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "run `git lfs pull` in its repository"),
    **dict.fromkeys((b"<!doctype html", b"<html"), ("a web page, not audio", "download it again from its source")),
}
_SEARCHED_BYTES = 1 << 23  # in smaller files a section costs a search of the whole file
_SLACK_S = 0.25  # earlier versions read lengths from containers, rounded and with the codec's padding


class Reader(Protocol):
    """Reader of one recording."""

    sample_rate: int
    channels: int

    def num_frames(self) -> int:
        """Return the number of decoded frames; raises `AudioError` if decoding fails."""

    def blocks(self, first: int, frames: int | None = None) -> Iterator[np.ndarray]:
        """Yield float32 blocks, shape (frames, channels), from frame `first`: `frames` in all, fewer at the end of
        the recording, or all that follow. Raises `AudioError` for a damaged or truncated recording."""

    def close(self) -> None: ...


@contextmanager
def opened(uri: str) -> Iterator["Recordings"]:
    """Yield the file's recordings with the header checked; raises `AudioError`, also if the storage fails midway."""
    with audio_files.source(uri) as source:
        try:
            recordings = Recordings(uri, source)
            try:
                yield recordings
            finally:
                recordings.close()
        except AudioError:
            source.raise_error()  # the cause
            raise
        source.raise_error()


class Recordings:
    """All recordings of a file, joined. Further ones are searched for after the end of the first."""

    def __init__(self, uri: str, source: Source) -> None:
        self._uri, self._source = uri, source
        self._starts: list[int] | None = None
        self._header = source.read(audio_marks.HEADER_BYTES)
        begin = audio_streams.first(source, self._header)
        self._readers = [_reader(uri, source if begin == 0 else source.section(begin))]
        self.sample_rate, self.channels = self._readers[0].sample_rate, self._readers[0].channels
        self._check()

    def num_frames(self) -> int:
        """Return the number of decoded frames. Formats whose header cannot be checked are decoded."""
        numbers = [0, *takewhile(self._has, count(1))]
        frames = sum(self._readers[number].num_frames() for number in numbers)
        self._check_length(frames)
        return frames

    def blocks(self, first: int, frames: int | None = None) -> Iterator[np.ndarray]:
        """Yield blocks as `Reader.blocks` does. Up to 0.25 s missing at the end of a container are zeros."""
        left, position = frames, 0
        if self._is_led_astray(first, frames):
            self._has(1)
        for number in takewhile(self._has, count()):
            reader = self._readers[number]
            for block in reader.blocks(first, left):
                position += len(block)
                left = None if left is None else left - len(block)
                self._check_length(position)
                yield block
            if left == 0:
                return
            first = max(0, first - reader.num_frames()) if self._has(number + 1) else 0
        if left is not None and position and left <= _SLACK_S * self.sample_rate and isinstance(reader, AvReader):
            yield np.zeros((left, self.channels), np.float32)

    def _is_led_astray(self, first: int, frames: int | None) -> bool:
        """Whether the first reader needs the end of its recording: a seek in FLAC or Ogg may land in the next one,
        and FFmpeg reads on and decodes the next header as audio."""
        if isinstance(self._readers[0], AvReader) and self._source.size > _SEARCHED_BYTES:
            return frames is None
        return frames is None or first > 0 or isinstance(self._readers[0], AvReader)

    def close(self) -> None:
        for reader in self._readers:
            reader.close()

    def _has(self, number: int) -> bool:
        """Open the reader of the recording with this number; return whether there is one."""
        if number < len(self._readers):
            return True
        if self._starts is None:
            with self._source.kept():
                self._starts = self._looked_for()
        if number >= len(self._starts):
            return False
        if number == 1:
            self._readers.pop().close()  # that reader extends to the end of the file
        for begin, end in list(pairwise([*self._starts, self._source.size]))[len(self._readers) : number + 1]:
            self._readers.append(self._further(begin, end))
        return True

    def _looked_for(self) -> list[int]:
        size = self._source.size
        kind, starts, other = audio_streams.layout(self._source, size, self._header)
        if other:
            end = f"the end of its {kind} stream" if kind else "its end"
            raise AudioError(
                self._uri, f"{size - other.place:,} bytes after {end} are another file ({other.kind})", SPLIT
            )
        return starts

    def _further(self, begin: int, end: int) -> Reader:
        reader = _reader(self._uri, self._source.section(begin, end))
        which = f"the file joins several recordings, and the one at byte {begin}"
        if (reader.sample_rate, reader.channels) != (self.sample_rate, self.channels):
            raise AudioError(self._uri, f"{which} has another sample rate or layout", CONVERT)
        if isinstance(reader, SoundFileReader) and reader.num_frames() == 0:
            raise AudioError(self._uri, f"{which} is corrupt", COPY)
        return reader

    def _check(self) -> None:
        absurd = None
        if self.sample_rate not in SAMPLE_RATES:
            absurd = f"sample rate {self.sample_rate} Hz is outside {SAMPLE_RATES[0]}..{SAMPLE_RATES[-1]} Hz"
        elif not 1 <= self.channels <= MAX_CHANNELS:
            absurd = f"{self.channels} channels, at most {MAX_CHANNELS} are accepted"
        if absurd:
            raise AudioError(self._uri, absurd, CONVERT)

    def _check_length(self, frames: int) -> None:
        duration_s = frames / self.sample_rate
        if duration_s > MAX_DURATION_S:
            reason = f"{duration_s / 3600:.1f} h long, at most {MAX_DURATION_S / 3600:.0f} h are accepted"
            raise AudioError(self._uri, reason, CONVERT)


def _reader(uri: str, source: Source) -> Reader:
    source.seek(0)
    header = source.read(audio_marks.HEADER_BYTES)
    if no_audio := next(
        (reason for start, reason in _NO_AUDIO.items() if header.lstrip().lower().startswith(start)), None
    ):
        raise AudioError(uri, *no_audio)
    if header.startswith(b"OggS") and (fault := audio_streams.opus_fault(source, source.size)):
        raise AudioError(uri, fault, "encode it again, or repair it with opus-tools")
    if header.startswith(b"OggS") and (gap := audio_streams.ogg_gap(source, source.size)):
        raise AudioError(uri, gap, COPY)
    if header.startswith(b"RIFF") and (fault := audio_streams.wav_fault(source, source.size)):
        raise AudioError(uri, fault, EXPORT)
    if header.startswith(b"RIFF") and (more := audio_streams.behind_data(source, source.size)):
        reason = f"its header leaves out {more} bytes after the samples, which are not a chunk"
        raise AudioError(uri, reason, REWRITE)
    if header.startswith(b".snd") and header[8:12] == bytes(4):  # a streaming writer's
        source = source.patched(8, b"\xff\xff\xff\xff")
    if (end := audio_ends.trimmed(source, source.size)) < source.size:
        source = source.section(0, end)
    source.seek(0)
    try:
        sound = SoundFileReader(uri, source, header)
        if sound.reads_all(source):
            return sound
        sound.close()
        refusal = "it does not read this to the end"
    except soundfile.LibsndfileError as error:
        refusal = error.error_string.rstrip(".")
    try:
        return AvReader(uri, source)
    except (av.FFmpegError, ValueError) as error:
        if isinstance(error, AudioError):
            raise
        both = f"soundfile ({refusal}) or PyAV ({one_line(error)})"
        raise AudioError(uri, f"not audio that {both} can read", CONVERT) from error
