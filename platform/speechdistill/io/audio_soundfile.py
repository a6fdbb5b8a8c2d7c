"""Recordings that libsndfile reads: WAV, FLAC, Ogg, MP3, AIFF, AU, CAF, W64, ... with exact lengths and seeking."""

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import soundfile

from speechdistill.io import audio_streams
from speechdistill.io.audio_files import COPY, Source
from speechdistill.io.errors import AudioError

BLOCK_FRAMES = 1 << 18
_PROMISED = re.compile(r"^\s*(?:data|SSND|BODY|Data Size|riff)\s*: (\d+) \(should be (\d+)\)", re.MULTILINE)
_RF64 = re.compile(r"Calculated frame count (\d+) does not match value from 'ds64' chunk of (\d+)")
_NIST = re.compile(rb"^NIST_1A.*^sample_count -i (\d+)", re.MULTILINE | re.DOTALL)
# Sizes that mean "read to the end": writers to a pipe fill in the largest number, with or without a sign, from which
# some subtract the header, and SoX and others a round number.
_LARGEST, _HEADER_BYTES, _ROUND = (1 << 31, 1 << 32), 1 << 13, 100_000_000


class SoundFileReader:
    """A recording that libsndfile reads; raises `soundfile.LibsndfileError` for what it does not know."""

    def __init__(self, uri: str, source: Source) -> None:
        source.seek(0)
        header = source.read(1024)
        source.seek(0)
        self._uri = uri
        self._sound = soundfile.SoundFile(source)
        self._was_read = False
        self.sample_rate: int = self._sound.samplerate
        self.channels: int = self._sound.channels
        if missing := _missing(self._sound, header):
            self.close()
            fix = f"{COPY}, or rewrite its header (`ffmpeg -i IN OUT`)"
            raise AudioError(uri, f"truncated ({missing})", fix)

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
        """Whether libsndfile knows the length, and a decoder for what a WAV file holds.

        False for FLAC written to a pipe, for MP3 without a Xing tag (whose length is guessed) or with more behind what
        the tag counts, for MP3 in WAV (whose length is rounded up), and for a WAV file of size 0 that holds more.
        """
        if self._sound.format == "MP3":
            with source.kept():
                return audio_streams.xing_counts_all(source)
        if self._sound.format in ("WAV", "WAVEX", "RF64") and self._sound.subtype == "MPEG_LAYER_III":
            return False
        if self._sound.frames == 0 and re.search(r"^data : 0$", self._sound.extra_info, re.MULTILINE):
            return source.size <= 64
        return bool(self._sound.frames < 1 << 62)

    def close(self) -> None:
        self._sound.close()

    def _run_up(self, first: int) -> int:
        """Frames to decode before `first`, since lossy decoders carry state: MP3's reservoir reaches back 511 bytes."""
        near_end = self.num_frames() - first < 10 * self.sample_rate
        if self._sound.subtype == "VORBIS" and near_end:  # libsndfile is some samples off after a seek to the last page
            return 10 * self.sample_rate
        return self.sample_rate if self._sound.format in ("MP3", "OGG") else 0

    def _read(self, left: int) -> Iterator[np.ndarray]:
        while left > 0:
            block = self._sound.read(min(left, BLOCK_FRAMES), dtype="float32", always_2d=True)
            if len(block) == 0:
                reason = f"truncated ({left} of {self.num_frames()} frames are missing)"
                raise AudioError(self._uri, reason, COPY)
            left -= len(block)
            yield block


def _missing(sound: Any, header: bytes) -> str | None:
    """What the header promises beyond the end; libsndfile shortens such a file and only logs it."""
    log = sound.extra_info
    if match := _PROMISED.search(log):
        promised, held = map(int, match.groups())
        if promised > held and not _is_placeholder(promised):
            return f"its header promises {promised} bytes of samples, the file holds {held}"
    if match := _RF64.search(log):
        return f"its header promises {match[2]} frames, the file holds {match[1]}"
    nist = _NIST.search(header)
    if nist and int(nist[1]) > sound.frames:
        return f"its header promises {int(nist[1])} frames, the file holds {sound.frames}"
    return None


def _is_placeholder(promised: int) -> bool:
    return promised % _ROUND == 0 or any(0 <= largest - promised < _HEADER_BYTES for largest in _LARGEST)
