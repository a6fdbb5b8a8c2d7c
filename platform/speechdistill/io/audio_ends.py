"""Ends of recordings, by the sizes in their headers, and the tags after them."""

import re
from collections.abc import Iterator
from typing import Literal

from speechdistill.io import audio_marks
from speechdistill.io.audio_marks import at
from speechdistill.io.tar_files import Readable

STATED = ("WAV", "AIFF", "AU", "CAF", "W64", "MP4", "Matroska", "NIST", "VOC", "ASF")
_READ_TOO_FAR = ("W64", "NIST", "VOC", "ASF")  # decoders read a tag after these as audio, or count it in the length
_NO_SAMPLES = 64  # bytes after an empty chunk that may be other chunks
_NAME = re.compile(rb"[\x20-\x7e]{4}|ID3.", re.DOTALL)
_NIST_FIELD = re.compile(rb"^(sample_count|channel_count|sample_n_bytes) -i (\d+)", re.MULTILINE)
_Order = Literal["little", "big"]


def trimmed(file: Readable, size: int) -> int:
    """Return the end of the bytes that a decoder must read, if the decoder would not stop there itself."""
    kind = audio_marks.kind(file, 0)
    if kind in ("MP3", "AAC"):
        return _tags_begin(file, size)
    end, is_known = stated(file, 0, size, kind) if kind in _READ_TOO_FAR else (size, True)
    return end if is_known else size


def stated(file: Readable, begin: int, size: int, kind: str) -> tuple[int, bool]:
    """Return the end of a recording and True, or its first sample and False if the file does not state its size.

    `kind` is one of `STATED`. Writers to a pipe leave placeholders for sizes.
    """
    if kind in ("WAV", "AIFF", "CAF"):
        return _chunks_end(file, begin, size, kind)
    if kind == "AU":
        head = at(file, begin, 12)
        data, length = int.from_bytes(head[4:8], "big"), int.from_bytes(head[8:12], "big")
        return _known(begin + data, length or size, size)
    if kind == "NIST":
        head = at(file, begin, audio_marks.HEADER_BYTES)
        fields = {name: int(value) for name, value in _NIST_FIELD.findall(head)}
        length = fields.get(b"sample_count", size) * fields.get(b"channel_count", 1) * fields.get(b"sample_n_bytes", 2)
        return _known(begin + int(head[8:16].strip() or 0), length, size)
    ends = {"MP4": _boxes_end, "Matroska": _segment_end, "VOC": _blocks_end, "ASF": _objects_end, "W64": _objects_end}
    return ends[kind](file, begin, size)


def chunks(file: Readable, place: int, size: int, order: _Order, width: int = 4) -> Iterator[tuple[bytes, int, int]]:
    """Yield name, first byte and length of the chunks from `place` on, up to bytes that are not a chunk."""
    data = 0
    while place + 4 + width <= size and not audio_marks.kind(file, place):
        head = at(file, place, 32)
        name, length = head[:4], int.from_bytes(head[4 : 4 + width], order)
        if not _NAME.fullmatch(name):
            return
        if name == b"ds64":
            data = int.from_bytes(head[16:24], "little")
        elif name == b"data" and data:
            length = data
        yield name, place + 4 + width, length
        place += 4 + width + length
        if width == 4 and length % 2:
            following = at(file, place, 5)  # some writers leave out the pad
            place += not _NAME.fullmatch(following[:4]) or bool(_NAME.fullmatch(following[1:]))


def _known(data: int, length: int, size: int) -> tuple[int, bool]:
    return (data + length, True) if data + length <= size else (data, False)


def _chunks_end(file: Readable, begin: int, size: int, kind: str) -> tuple[int, bool]:
    wide = kind == "CAF"
    end = begin + (8 if wide else 12)
    order: _Order = "little" if at(file, begin, 4) in (b"RIFF", b"RF64", b"BW64") else "big"
    for _, place, length in chunks(file, end, size, order, 8 if wide else 4):
        if place + length > size or (length == 0 and place < size - _NO_SAMPLES):
            return place, False
        end = place + length
        if not wide and length % 2 and at(file, end, 1) == b"\0":
            end += 1
    return end, True


def _boxes_end(file: Readable, begin: int, size: int) -> tuple[int, bool]:
    """Return the end of the boxes of an MP4 file (ISO/IEC 14496-12, section 4.2)."""
    place = begin
    while place + 8 <= size and (place == begin or not audio_marks.kind(file, place)):
        head = at(file, place, 16)
        length = int.from_bytes(head[8:16] if head[:4] == b"\0\0\0\1" else head[:4], "big")
        if not _NAME.fullmatch(head[4:8]) or 0 < length < 8:
            break
        if length == 0 or place + length > size:  # 0: to the end of the file
            return place + 8, False
        place += length
    return place, True


def _segment_end(file: Readable, begin: int, size: int) -> tuple[int, bool]:
    """Return the end of the two elements of a Matroska file (RFC 8794, sections 4 and 6.2)."""
    place = begin
    for _ in range(2):
        head = at(file, place + 4, 8).ljust(1, b"\0")  # behind the identifier
        width = 9 - head[0].bit_length()
        length = int.from_bytes(head[:width], "big") & (1 << 7 * width) - 1
        if width > 8 or length == (1 << 7 * width) - 1 or place + 4 + width + length > size:
            return place + 4, False
        place += 4 + width + length
    return place, True


def _blocks_end(file: Readable, begin: int, size: int) -> tuple[int, bool]:
    """Return the end of the blocks of a VOC file. A block has a type, 0 for the end, and three bytes of length."""
    place = begin + int.from_bytes(at(file, begin + 20, 2), "little")
    while place < size:
        head = at(file, place, 4)
        if head[0] == 0:
            return place + 1, True
        place += 4 + int.from_bytes(head[1:], "little")
    return begin + 26, place == size


def _objects_end(file: Readable, begin: int, size: int) -> tuple[int, bool]:
    """Return the end of ASF's objects (specification, section 2.1), or of the one object that is a W64 file.

    An object has 16 bytes of name and 8 of length.
    """
    place, passed = begin, 0
    least = 1 if at(file, begin, 4) == b"riff" else 2  # ASF's header and data; indices may follow
    while place + 24 <= size and not (passed >= least and (least == 1 or audio_marks.kind(file, place))):
        length = int.from_bytes(at(file, place + 16, 8), "little")
        if length < 24 or place + length > size:
            break
        place, passed = place + length, passed + 1
    return (place, True) if passed >= least else (begin + 24, False)


def _tags_begin(file: Readable, size: int) -> int:
    """Return the end of the last frame of an MP3 or AAC file, before its tags (ID3v1, Lyrics3v2, APE) in a row."""
    while True:
        tail = at(file, max(0, size - 128), 128)
        if len(tail) == 128 and tail[:3] == b"TAG":
            begin, mark = size - 128, b"TAG"
        elif tail[-9:] == b"LYRICS200" and tail[-15:-9].isdigit():
            begin, mark = size - 15 - int(tail[-15:-9]), b"LYRICSBEGIN"
        elif tail[-32:-24] == b"APETAGEX":
            has_header = tail[-9] & 0x80
            length = int.from_bytes(tail[-20:-16], "little")  # with the footer, without the header
            begin, mark = size - length - (32 if has_header else 0), b"APETAGEX" if has_header else b""
        else:
            return size
        if begin <= 0 or at(file, begin, len(mark)) != mark:
            return size
        size = begin
