"""Recordings that libsndfile reads: WAV, FLAC, Ogg, MP3, AIFF, AU, CAF, W64, ... with exact lengths and seeking."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile

from speechdistill.io import audio_streams
from speechdistill.io.audio_files import COPY, REWRITE, Source
from speechdistill.io.errors import AudioError

BLOCK_FRAMES = 1 << 18
_PROMISED = re.compile(r"^\s*(?:data|SSND|BODY|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_RF64 = re.compile(r"Calculated frame count (\d+) does not match value from 'ds64' chunk of (\d+)")
_NIST = re.compile(rb"^NIST_1A.*^sample_count -i (\d+)", re.MULTILINE | re.DOTALL)
# Sizes that mean "read to the end": writers to a pipe store the largest signed or unsigned number, some of them minus
# the header; SoX and others store a round number.
_LARGEST, _HEADER_BYTES, _ROUND = (1 << 31, 1 << 32), 1 << 13, 100_000_000
_LATE_S = 0.25  # more than the samples that Opus decoders drop at the beginning
_HEADER_ALONE = 128  # bytes
_XING_SLACK_BYTES = 4096  # some encoders count a frame or a tag too many


class SoundFileReader:
    """Reader for libsndfile's formats; raises `soundfile.LibsndfileError` for a file that libsndfile cannot read."""

    def __init__(self, uri: str, source: Source, header: bytes) -> None:
        self._uri, self._source = uri, source
        self._sound = soundfile.SoundFile(source)
        self._was_read = False
        self.sample_rate: int = self._sound.samplerate
        self.channels: int = self._sound.channels
        with source.kept():
            missing = _missing(self._sound, header) or _is_cut(self._sound.format, source)
        if missing:
            self.close()
            raise AudioError(uri, missing, REWRITE)

    def num_frames(self) -> int:
        frames: int = self._sound.frames
        return frames

    def blocks(self, first: int, frames: int | None = None) -> Iterator[np.ndarray]:
        frames = min(self.num_frames() - first, self.num_frames() if frames is None else frames)
        if frames <= 0:
            return
        skip = first
        try:
            if self._sound.seekable():  # GSM 6.10 and some ADPCM are not
                skip = min(first, self._run_up(first))
                if self._was_read or first > skip:
                    self._sound.seek(first - skip)
            self._was_read = True
            for block in self._read(skip + frames):
                yield block[skip:]
                skip = max(0, skip - len(block))
        except soundfile.LibsndfileError as error:
            raise AudioError(self._uri, f"corrupt ({error.error_string.rstrip('.')})", COPY) from error

    def reads_all(self, source: Source) -> bool:
        """Whether libsndfile knows the length, and decodes the codec in a WAV file.

        False for FLAC written to a pipe, for MP3 without a Xing tag (libsndfile guesses the length) or with more frames
        than the tag counts, for MP3 in WAV (the length is rounded up), and for a file without samples that is larger
        than a header.
        """
        if self._sound.format == "MP3":
            with source.kept():
                end = audio_streams.xing_end(source)
                return end is not None and not audio_streams.goes_on_at(source, end)
        is_mp3 = self._sound.subtype == "MPEG_LAYER_III"
        return not is_mp3 and (0 < self._sound.frames < 1 << 62 or source.size < _HEADER_ALONE)

    def close(self) -> None:
        self._sound.close()

    def _run_up(self, first: int) -> int:
        """Return the frames to decode before `first`: lossy decoders carry state. MP3's reservoir is 511 bytes long."""
        near_end = self.num_frames() - first < 10 * self.sample_rate
        if self._sound.subtype == "VORBIS" and near_end:  # libsndfile is some samples off after a seek to the last page
            return 10 * self.sample_rate
        if self._sound.format == "OGG" and self._begins_late():
            return first  # libsndfile seeks to a wrong position
        return self.sample_rate if self._sound.format in ("MP3", "OGG") else 0

    def _begins_late(self) -> bool:
        """Whether an Ogg file is part of a longer stream: its positions do not begin at 0."""
        with self._source.kept():
            position = audio_streams.ogg_position(self._source, self._source.size)
        rate = 48_000 if self._sound.subtype == "OPUS" else self.sample_rate  # RFC 7845, section 4
        return position / rate > self.num_frames() / self.sample_rate + _LATE_S

    def _read(self, left: int) -> Iterator[np.ndarray]:
        while left > 0:
            block = self._sound.read(min(left, BLOCK_FRAMES), dtype="float32", always_2d=True)
            if len(block) == 0:
                reason = f"truncated ({left} of {self.num_frames()} frames are missing)"
                raise AudioError(self._uri, reason, COPY)
            left -= len(block)
            yield block


def _missing(sound: Any, header: bytes) -> str | None:
    """Return the reason if the header promises more than the file holds: libsndfile only logs the shorter length."""
    log = sound.extra_info
    if match := _PROMISED.search(log):
        promised, held = map(int, match.groups())
        if promised > held and not _is_placeholder(promised):
            return f"truncated (its header promises {promised} bytes of samples, the file holds {held})"
    if match := _RF64.search(log):
        return f"truncated (its header promises {match[2]} frames, the file holds {match[1]})"
    nist = _NIST.search(header)
    if nist and int(nist[1]) > sound.frames:
        return f"truncated (its header promises {int(nist[1])} frames, the file holds {sound.frames})"
    return None


def _is_cut(form: str, source: Source) -> str | None:
    """Return the reason if an MP3 or Ogg file is cut: libsndfile reads it as a whole file."""
    if form == "MP3":
        end = audio_streams.xing_end(source) or 0
        cut = end - source.size > _XING_SLACK_BYTES
        return f"truncated (its Xing tag counts {end} bytes, the file holds {source.size})" if cut else None
    if form == "OGG" and audio_streams.ogg_is_cut(source, source.size):
        return "truncated (it ends inside a page)"
    return None


def _is_placeholder(promised: int) -> bool:
    return promised % _ROUND == 0 or any(0 <= largest - promised < _HEADER_BYTES for largest in _LARGEST)
