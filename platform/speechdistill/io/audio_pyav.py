"""Recordings that only FFmpeg reads: AAC, AMR, WMA, WebM, video files, ..."""

import logging
import re
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, islice

import av
import numpy as np

from speechdistill.io.audio_files import CONVERT, COPY, Source, one_line
from speechdistill.io.errors import AudioError

_LOG = logging.getLogger(__name__)
_PREROLL_S = 1.0  # decoders with memory need a run-up to a seek point (RFC 7845: 80 ms for Opus)
_SLACK_S = 0.25  # containers round lengths and count the codec's padding; a tag between packets is not damage
_JITTER_S = 0.05  # timestamps that stray less are rounded ones
_MAX_PAUSE_S = 600.0
_STATES_LENGTH = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm", "asf", "wav")  # others guess it from the bit rate
_Frame = tuple[int | None, np.ndarray]  # timestamp; block


class AvReader:
    """Reader of a file's first audio stream; raises `av.FFmpegError` or `ValueError` if FFmpeg cannot read it.

    Position 0 is the first sample, or the start of another stream, such as a video's picture, more than 50 ms earlier.
    Pauses between timestamps are silence. The recording ends with the last decoded sample.
    """

    def __init__(self, uri: str, source: Source) -> None:
        self._uri, self._source = uri, source
        self._num_frames: int | None = None
        self._open()
        context = self._stream.codec_context
        self.sample_rate, self.channels = context.sample_rate or 0, context.channels
        self._fresh = True  # nothing was read yet

    def num_frames(self) -> int:
        if self._num_frames is None:
            self._num_frames = sum(len(block) for block in self.blocks(0))
        return self._num_frames

    def blocks(self, first: int, frames: int | None = None) -> Iterator[np.ndarray]:
        if not self._fresh:
            self._container.close()
            self._open()
        if (others := len(self._container.streams.audio) - 1) and (first, frames) == (0, None):
            _LOG.warning("%s: only the first of its %d audio streams is used", self._uri, others + 1)
        self._fresh = False
        end = None if frames is None else first + frames
        position = 0
        for position, block in self._decoded(first):
            wanted = block[max(0, first - position) : None if end is None else max(0, end - position)]
            position += len(block)
            if len(wanted):
                yield wanted
            if end is not None and position >= end:
                return
        missing_s = (self._promised_s() or 0) - position / self.sample_rate
        if missing_s > _SLACK_S:
            raise AudioError(self._uri, f"truncated, {missing_s:.2f} s are missing", COPY)

    def close(self) -> None:
        self._container.close()

    def _open(self) -> None:
        self._source.seek(0)
        # A playlist must not make FFmpeg open other files or addresses.
        options = {"protocol_whitelist": "none"}
        self._container = av.open(self._source, options=options, metadata_errors="replace")
        if not self._container.streams.audio or self._container.streams.audio[0].codec_context is None:
            raise ValueError("no audio stream, or no decoder for it")
        self._stream = self._container.streams.audio[0]

    def _promised_s(self) -> float | None:
        """Return the length of the audio that the file states; None if it states none, or that of a longer picture."""
        stream, container = self._stream, self._container
        if container.format.name not in _STATES_LENGTH:
            return None
        if stream.duration:
            return float(stream.duration * stream.time_base)
        if match := re.fullmatch(r"(\d+):(\d+):([\d.]+)", stream.metadata.get("DURATION", "")):  # Matroska's end
            hours, minutes, seconds = map(float, match.groups())
            return 3600 * hours + 60 * minutes + seconds - self._start_s()
        if container.duration and len(container.streams) == 1:
            return float(container.duration / av.time_base) - self._start_s()
        return None

    def _start_s(self) -> float:
        return max(0.0, float((self._container.start_time or 0) / av.time_base))

    def _decoded(self, first: int) -> Iterator[tuple[int, np.ndarray]]:
        """Yield blocks with their positions, from one at or before `first`; pauses are blocks of zeros."""
        frames = self._frames()
        opening = list(islice(frames, 2))
        if not opening:
            return
        late = self._late(opening[0][0])
        origin = opening[0][0]
        position, frames = late, chain(opening, frames)
        if first > 2 * _PREROLL_S * self.sample_rate and len(opening) == 2:
            sought = self._sought(first, opening, late)
            if sought is None:
                self._container.close()
                self._open()
            position, frames = sought or (late, self._frames())
        if position == late and late:
            yield 0, np.zeros((late, self.channels), np.float32)
        shift = 0  # lag of the timestamps of a stream that restarts
        for pts, block in frames:
            if origin is not None and pts is not None:
                due = late + round((pts - origin) * self._stream.time_base * self.sample_rate) + shift
                pause = due - position
                if pause < -self.sample_rate:
                    shift -= pause
                elif pause > _JITTER_S * self.sample_rate and block is not opening[0][1]:
                    yield position, self._silence(pause)
                    position += pause
            yield position, block
            position += len(block)

    def _late(self, pts: int | None) -> int:
        """Return the frames between the beginning of the file's first stream and the beginning of its audio."""
        start = self._container.start_time
        if pts is None or start is None or len(self._container.streams) == 1:
            return 0
        late_s = float(pts * self._stream.time_base) - start / av.time_base
        if late_s > _MAX_PAUSE_S:
            raise AudioError(self._uri, f"its audio begins {late_s:.0f} s after its other streams", CONVERT)
        return round(late_s * self.sample_rate) if late_s > _JITTER_S else 0

    def _silence(self, pause: int) -> np.ndarray:
        if pause > _MAX_PAUSE_S * self.sample_rate:
            raise AudioError(self._uri, f"its timestamps jump by {pause / self.sample_rate:.0f} s", CONVERT)
        return np.zeros((pause, self.channels), np.float32)

    def _frames(self) -> Iterator[_Frame]:
        """Yield frames from the container's position. Packets that cannot be decoded become silence, up to 0.25 s."""
        planar = av.AudioResampler(format="fltp")
        lost_s, cause, decodes = 0.0, "", False
        gap: list[_Frame] = []  # silence for packets that could not be decoded, if others follow
        for packet in self._packets():
            try:
                frames = packet.decode()
            except av.FFmpegError as error:
                seconds = float((packet.duration or 0) * self._stream.time_base)
                lost_s, cause = lost_s + seconds, cause or one_line(error)
                if lost_s > _SLACK_S:
                    raise AudioError(self._uri, f"corrupt ({cause}), {lost_s:.2f} s are lost", COPY) from error
                gap.append((packet.pts, np.zeros((round(seconds * self.sample_rate), self.channels), np.float32)))
                continue
            for frame in frames:
                if (frame.sample_rate, frame.layout.nb_channels) != (self.sample_rate, self.channels):
                    raise AudioError(self._uri, "its sample rate or number of channels changes midway", CONVERT)
                decodes = True
                yield from gap
                gap.clear()
                for converted in planar.resample(frame):
                    yield frame.pts, converted.to_ndarray().T
        if cause and not decodes:
            raise AudioError(self._uri, f"corrupt ({cause})", COPY)
        if cause:
            _LOG.warning("%s: packets of %.2f s could not be decoded (%s)", self._uri, lost_s, cause)

    def _packets(self) -> Iterator["av.Packet[av.AudioStream]"]:
        try:
            yield from self._container.demux(self._stream)
        except av.FFmpegError as error:  # harmless after the last packet, which a stated length shows
            if self._promised_s() is None:
                raise AudioError(self._uri, f"corrupt ({one_line(error)})", COPY) from error

    def _sought(self, first: int, opening: list[_Frame], late: int) -> tuple[int, Iterator[_Frame]] | None:
        """Seek to before `first`; return position and frames, or None if the container cannot seek."""
        (origin, lead), (_, regular) = opening
        rate, base = self.sample_rate, self._stream.time_base
        if origin is None:
            return None
        try:
            target = origin + int(((first - late) / rate - _PREROLL_S) / base)
            self._container.seek(target, stream=self._stream)
            frames = self._frames()
            _, (pts, block) = islice(frames, 2)  # some decoders drop a part of the first
        except (av.FFmpegError, ValueError):  # ValueError: fewer than two frames
            return None
        if pts is None:
            return None
        position = late + _on_grid((pts - origin) * base * rate, len(lead), len(regular), 2 * base * rate)
        return (position, chain([(pts, block)], frames)) if position <= first else None


def _on_grid(position: Fraction, lead: int, size: int, tolerance: Fraction) -> int:
    """Return the exact start of a frame from its timestamp, which WebM rounds to milliseconds."""
    if tolerance >= size / 4:  # ambiguous
        return round(position)
    nearest = lead + round((position - lead) / size) * size
    return nearest if abs(nearest - position) <= tolerance else round(position)
