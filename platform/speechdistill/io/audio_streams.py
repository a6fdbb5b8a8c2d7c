"""Layout of files that join several recordings, such as `cat a.flac b.flac` and chained Ogg streams.

Formats that state their sizes (WAV, MP4, ...) are walked. Others are searched for marks. Long files are searched only
if the end or the middle does not fit the header, since long files on object stores are read by ranges.
"""

import re
import struct
from typing import NamedTuple

from speechdistill.io import audio_ends, audio_flac, audio_marks
from speechdistill.io.audio_marks import Mark, at, id3_end
from speechdistill.io.tar_files import Readable

_SEARCHED_BYTES = 1 << 18  # one request; shorter files are searched whole
_TAIL_BYTES = 27 + 255 + 255 * 255  # holds the last page of an Ogg stream
_READ_ON = ("AAC", "WavPack", "")  # decoders read on, and each of their frames has the mark


class Layout(NamedTuple):
    """First bytes of the recordings of a file, all of format `kind`, and a file of another format after them."""

    kind: str
    starts: list[int]
    other: Mark | None


def first(file: Readable, header: bytes) -> int:
    """Return the first byte of the first recording, above 0 after an ID3v2 tag before a format without such tags.

    `header` is the first `HEADER_BYTES` of the file.
    """
    behind = id3_end(header)
    return behind if behind and at(file, behind, 4) in (b"RIFF", b"FORM", b"fLaC", b"OggS") else 0


def layout(file: Readable, size: int, header: bytes) -> Layout:
    """Return the recordings of a file of `size` bytes; nearly all files have one."""
    begin = first(file, header)
    kind, starts, among = audio_marks.kind(file, begin), [begin], ""
    if kind in audio_ends.STATED:
        behind, is_known = audio_ends.stated(file, begin, size, kind)
        while is_known and behind < size and audio_marks.kind(file, behind) == kind:
            starts.append(behind)
            behind, is_known = audio_ends.stated(file, behind, size, kind)
        among = kind if is_known else ""  # samples may be MP3
    else:
        behind, among = _behind(file, begin, size, kind), kind
    found = list(audio_marks.search(file, behind, size, among)) if behind < size else []
    own = [mark.place for mark in found if mark.kind == kind and kind not in _READ_ON]
    if kind == "Ogg":  # streams that begin together, such as a film's, are one recording
        own = [place for place, before in zip(own, [begin, *own], strict=False) if place != _page_end(file, before)]
    passed = (kind, "MP3", "AAC") if kind == "" else (kind,)  # frames after junk, which decoders skip
    return Layout(kind, starts + own, next((mark for mark in found if mark.kind not in passed), None))


def xing_end(file: Readable) -> int | None:
    """Return the end of the frames that the Xing tag of an MP3 file counts; None if no tag counts them."""
    begin = audio_marks.behind_tags(file, 0)
    head = at(file, begin, 4096)
    match = re.search(rb"(?:Xing|Info)...(.)", head, re.DOTALL)
    if match is None or not match[1][0] & 2:  # flags: 1, a count of frames follows; 2, then one of bytes
        return None
    place = match.end() + 4 * (match[1][0] & 1)
    return begin + int.from_bytes(head[place : place + 4], "big")


def goes_on_at(file: Readable, end: int) -> bool:
    """Whether an MP3 frame, or a tag before a frame, follows the last frame that a Xing tag counts."""
    behind = at(file, end, 3)
    is_tag, is_frame = behind == b"ID3", behind[:1] == b"\xff" and behind[1:2] >= b"\xe0"
    return is_frame or (is_tag and audio_marks.kind(file, end) == "MP3")  # other tags are those of the whole file


def wav_fault(file: Readable, size: int) -> str | None:
    """Return the reason if the header of a WAV file does not define the width of a sample: decoders differ then."""
    for name, place, _ in audio_ends.chunks(file, 12, size, "little"):
        if name != b"fmt ":
            continue
        tag, channels, _, _, block, bits = struct.unpack("<HHIIHH", at(file, place, 16).ljust(16, b"\0"))
        if tag in (1, 3, 0xFFFE) and channels and block != channels * -(-bits // 8):
            return f"its header says {bits} bits a sample, but {block} bytes for {channels}"
    return None


def opus_fault(file: Readable, size: int) -> str | None:
    """Return the reason if the pages of an Ogg Opus file have no positions: FFmpeg then drops the last pages."""
    last = _last_page(file, size)
    is_lost = b"OpusHead" in at(file, 0, 64) and int.from_bytes(last[18:22], "little") > 1 and last[6:14] == bytes(8)
    return "the granule positions of its pages are 0, so that its length is unknown" if is_lost else None


def ogg_gap(file: Readable, size: int) -> str | None:
    """Return the reason if pages are missing inside an Ogg file of one request: decoders fill them with other audio.

    After the headers the numbers may continue anywhere, as in a part of a longer stream.
    """
    place, before = (
        0,
        dict[bytes, tuple[int, bool]](),
    )  # of each stream: the last page's number, and whether it is audio
    while place < size <= _SEARCHED_BYTES:
        page = at(file, place, 27)
        if page[:4] != b"OggS" or len(page) < 27:
            return None
        stream, number = page[14:18], int.from_bytes(page[18:22], "little")
        last, is_audio = before.get(stream, (number - 1, False))
        if is_audio and number > last + 1:
            return f"corrupt ({number - last - 1} pages are missing before byte {place})"
        before[stream] = number, page[6:14] not in (bytes(8), b"\xff" * 8)
        place = _page_end(file, place)
    return None


def ogg_position(file: Readable, size: int) -> int:
    """Return the granule position of the last page, the end of an Ogg file in its stream (RFC 3533, section 6)."""
    return int.from_bytes(_last_page(file, size)[6:14], "little", signed=True)


def ogg_is_cut(file: Readable, size: int) -> bool:
    """Whether an Ogg file ends inside a page."""
    begin = max(0, size - _TAIL_BYTES)
    tail = at(file, begin, size - begin)
    last = tail.rfind(b"OggS\x00")
    return last >= 0 and _page_end(file, begin + last) > size


def behind_data(file: Readable, size: int) -> int:
    """Return the number of bytes after the samples of a WAV file that are not chunks: the header covers only a part."""
    for name, place, length in audio_ends.chunks(file, 12, size, "little"):
        end = place + length
        if name != b"data" or not 0 < length < size - place - 8:
            continue
        following = at(file, end, 5)
        is_chunk = any(map(_BEHIND.fullmatch, {following[:4], following[length % 2 :][:4]}))  # some leave out the pad
        if not is_chunk or b"data" in following:
            return 0 if audio_marks.kind(file, end) else size - end
    return 0


_BEHIND = re.compile(rb"[\x20-\x7e]{4}|ID3.|\0*", re.DOTALL)  # a chunk, a tag or padding after the last chunk


def _behind(file: Readable, begin: int, size: int, kind: str) -> int:
    """Return the byte from which to search for another recording; the size if there is none for certain."""
    if kind == "Ogg":
        return begin + 1 if size - begin <= _SEARCHED_BYTES or _ogg_goes_on(file, begin, size) else size
    if kind == "FLAC":
        return begin + 1 if audio_flac.goes_on(file, begin, size, at(file, begin, 42)) else size
    if kind == "MP3":
        return xing_end(file) or audio_marks.behind_tags(file, begin) + 1
    return begin + 1


def _ogg_goes_on(file: Readable, first: int, size: int) -> bool:
    """Whether the last page is of another stream than the first (RFC 3533: serial numbers differ), or not the end."""
    begin = max(0, size - _TAIL_BYTES)
    tail = at(file, begin, _TAIL_BYTES)
    last = tail.rfind(b"OggS\x00")
    ends = last >= 0 and _page_end(file, begin + last) == size
    return not ends or tail[last + 14 : last + 18] != at(file, first + 14, 4)


def _last_page(file: Readable, size: int) -> bytes:
    tail = at(file, max(0, size - _TAIL_BYTES), _TAIL_BYTES)
    return tail[max(0, tail.rfind(b"OggS\x00")) :]


def _page_end(file: Readable, place: int) -> int:
    """The byte behind an Ogg page (RFC 3533, section 6)."""
    if place < 0:
        return -1
    header = at(file, place, 27 + 255)
    segments = header[26] if len(header) > 26 else 0
    return place + 27 + segments + sum(header[27 : 27 + segments])
