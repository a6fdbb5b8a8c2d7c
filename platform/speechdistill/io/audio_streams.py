"""Recordings that follow one another in one file, as `cat a.flac b.flac` and chained Ogg streams make them.

Each format that a plain concatenation keeps readable has its own mark of a beginning. Containers that state their sizes
(RIFF, AIFF, MP4) are walked; of the others the bytes are searched, of long ones only if their end or middle does not
fit their header, since a long file on an object store is else read by ranges.
"""

import re
from collections.abc import Iterator

from speechdistill.io.tar_files import Readable

HEADER_BYTES = 1 << 10
_SEARCHED_BYTES = 1 << 18  # one request; shorter files are searched whole
_TAIL_BYTES = 27 + 255 + 255 * 255  # holds the last page of an Ogg stream
_FRAME_BYTES = 1 << 13  # holds the header of some FLAC frame, if the file does not say how large they are
_READ_BYTES = 1 << 22
_LONGEST_MARK = 64

_FLAC = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")  # RFC 9639, section 8: the marker, then STREAMINFO of 34 bytes
_OGG = re.compile(rb"OggS\x00[\x02\x06]")  # RFC 3533, section 6: a page that begins a stream
_AMR = re.compile(rb"#!AMR(?:-WB)?\n")  # RFC 4867, section 5
_EBML = re.compile(rb"\x1aE\xdf\xa3.{4,40}?(?:matroska|webm)", re.DOTALL)
_ID3 = re.compile(rb"ID3[\x02-\x04]\x00[\x00-\xf0][\x00-\x7f]{4}(?=[A-Z]{3}[A-Z0-9])")  # ID3v2.4, section 3.1
_ASF = re.compile(re.escape(bytes.fromhex("3026b2758e66cf11a6d900aa0062ce6c")))


def first(file: Readable, header: bytes) -> int:
    """Return the byte at which the first recording begins: above 0 behind an ID3v2 tag of a format that has none.

    `header` is the beginning of the file, of `HEADER_BYTES`.
    """
    behind = _after_id3(header)
    return behind if behind and _at(file, behind, 4) in (b"RIFF", b"FORM", b"fLaC", b"OggS") else 0


def starts(file: Readable, size: int, header: bytes) -> list[int]:
    """Return the byte at which each recording of a file of `size` bytes begins: one for nearly all files."""
    begin = first(file, header)
    head = _at(file, begin, HEADER_BYTES) if begin else header
    if head[:4] in (b"RIFF", b"FORM"):
        found = list(_of_chunks(file, begin, size, head))
    elif head[4:8] == b"ftyp":
        found = list(_of_boxes(file, begin, size))
    elif mark := next((mark for magic, mark in _MARKS.items() if head.startswith(magic)), None):
        found = _searched(file, size, mark) if _may_have_more(file, begin, size, head) else []
    else:
        found = []  # ADTS and the like have no beginning to look for, and their decoders read on
    return sorted({begin, *found})


_MARKS = {b"fLaC": _FLAC, b"OggS": _OGG, b"#!AMR": _AMR, b"\x1aE\xdf\xa3": _EBML, b"0&\xb2u": _ASF}
_MARKS |= dict.fromkeys((b"ID3", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2", b"\xff\xe3", b"\xff\xe2"), _ID3)


def _at(file: Readable, place: int, size: int) -> bytes:
    file.seek(place)
    return file.read(size)


def _after_id3(tag: bytes) -> int:
    if not tag.startswith(b"ID3"):
        return 0
    return 10 + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(tag[6:10]))  # ID3v2.4, section 6.2


def xing_end(file: Readable) -> int | None:
    """Return the byte behind the frames that the Xing tag of an MP3 file counts; None without such a count."""
    begin = _after_id3(_at(file, 0, 10))
    head = _at(file, begin, 4096)
    match = re.search(rb"(?:Xing|Info)...(.)", head, re.DOTALL)
    if match is None or not match[1][0] & 2:  # flags: 1, a count of frames follows; 2, then one of bytes
        return None
    place = match.end() + 4 * (match[1][0] & 1)
    return begin + int.from_bytes(head[place : place + 4], "big")


def goes_on_at(file: Readable, end: int) -> bool:
    """Whether an MP3 frame, or a tag in front of one, follows the last one that a Xing tag counts."""
    behind = _at(file, end, 3)
    return behind == b"ID3" or (behind[:1] == b"\xff" and behind[1:2] >= b"\xe0")


def ogg_is_cut(file: Readable, size: int) -> bool:
    """Whether an Ogg file ends inside a page."""
    begin = max(0, size - _TAIL_BYTES)
    tail = _at(file, begin, size - begin)
    last = tail.rfind(b"OggS\x00")
    return last >= 0 and _page_end(file, begin + last) > size


def behind_data(file: Readable, size: int, header: bytes) -> int:
    """Return how many bytes behind the samples of a WAV file are no chunk: its header knows of a part only."""
    place = 12
    while place + 8 <= len(header) and header[place : place + 4] != b"data":
        length = int.from_bytes(header[place + 4 : place + 8], "little")
        place += 8 + length + length % 2
    if header[place : place + 4] != b"data" or len(header) < place + 8:
        return 0
    length = int.from_bytes(header[place + 4 : place + 8], "little")
    end = place + 8 + length
    name = _at(file, end + length % 2, 4) if length > 0 and end + 8 < size else b""
    is_chunk = re.fullmatch(rb"[\x20-\x7e]{4}|ID3.|\0*", name, re.DOTALL)  # or a tag, or padding, behind the last
    is_sound = name == b"data" or not is_chunk
    return size - end if is_sound else 0


def _of_chunks(file: Readable, first: int, size: int, head: bytes) -> Iterator[int]:
    """Yield the beginnings of RIFF or AIFF files by the sizes that they state; a placeholder leads to none."""
    magic, form = head[:4], head[8:12]
    while head[:4] == magic and head[8:12] == form:
        yield first
        length = int.from_bytes(head[4:8], "little" if magic == b"RIFF" else "big")
        first += 8 + length + length % 2
        head = _at(file, first, 12) if first + 12 <= size else b""


def _of_boxes(file: Readable, first: int, size: int) -> Iterator[int]:
    """Yield each `ftyp` box at the top of an MP4 file (ISO/IEC 14496-12, section 4.2)."""
    while first + 8 <= size:
        head = _at(file, first, 16)
        length = int.from_bytes(head[:4], "big")
        if head[4:8] == b"ftyp":
            yield first
        if length == 1:
            length = int.from_bytes(head[8:16], "big")
        if length < 8:  # 0: to the end of the file
            return
        first += length


def _may_have_more(file: Readable, first: int, size: int, head: bytes) -> bool:
    if head[:4] == b"OggS":
        return size - first <= _SEARCHED_BYTES or _ogg_goes_on(file, first, size)
    if head[:4] == b"fLaC":
        return _flac_goes_on(file, first, size, head)
    end = xing_end(file) if head[:3] == b"ID3" or head[:1] == b"\xff" else None
    return end is None or goes_on_at(file, end)


def _ogg_goes_on(file: Readable, first: int, size: int) -> bool:
    """Whether the last page is of another stream than the first (RFC 3533: serial numbers differ)."""
    begin = max(0, size - _TAIL_BYTES)
    tail = _at(file, begin, _TAIL_BYTES)
    last = tail.rfind(b"OggS\x00")
    return last < 0 or tail[last + 14 : last + 18] != _at(file, first + 14, 4)


def _flac_goes_on(file: Readable, first: int, size: int, head: bytes) -> bool:
    """Whether the last frame does not end where the header says, or the middle of the file is not about half way."""
    info = head[8:42]
    block, total = int.from_bytes(info[:2], "big"), int.from_bytes(info[13:18], "big") & (1 << 36) - 1
    if total == 0:
        return True
    length = max(_FRAME_BYTES, 2 * int.from_bytes(info[7:10], "big"))  # two of the largest frames
    *_, (start, samples) = [(-1, 0), *_flac_frames(_at(file, max(first, size - length), length), block)]
    if start + samples != total:
        return True
    middle, _ = next(_flac_frames(_at(file, (first + size) // 2, length), block), (total // 2, 0))
    return not 0.3 < middle / total < 0.7 and total > 2 * samples


def _flac_frames(data: bytes, block: int) -> Iterator[tuple[int, int]]:
    """Yield first sample and length of the frames whose headers lie in `data` (RFC 9639, section 9.1)."""
    for match in re.finditer(rb"\xff[\xf8\xf9]", data):
        header = data[match.start() : match.start() + 16]
        code = header[2] >> 4 if len(header) == 16 else 0
        width = max(1, 8 - (header[4] ^ 0xFF).bit_length()) if code else 0  # bytes of the number, coded as in UTF-8
        if not code or width > 7:
            continue
        place = 4 + width
        number = header[4] & (0x7F if width == 1 else 0xFF >> width + 1)
        for byte in header[5:place]:
            number = number << 6 | byte & 0x3F
        length, more = _flac_length(code, header[place : place + 2])
        rate = {12: 1, 13: 2, 14: 2}.get(header[2] & 0xF, 0)
        end = place + more + rate
        if end < 16 and _crc8(header[:end]) == header[end]:
            yield (number if header[1] & 1 else number * block), length


def _flac_length(code: int, following: bytes) -> tuple[int, int]:
    """Samples of a frame, and how many bytes of its header say so (RFC 9639, section 9.1.1)."""
    if code == 6:
        return following[0] + 1, 1
    if code == 7:
        return int.from_bytes(following, "big") + 1, 2
    return (192 if code == 1 else 576 << code - 2 if code < 6 else 256 << code - 8), 0


def _shifted(value: int) -> int:
    for _ in range(8):
        value = value << 1 ^ 0x107 if value & 0x80 else value << 1
    return value


_CRC8 = [_shifted(value) for value in range(256)]


def _crc8(data: bytes) -> int:
    value = 0
    for byte in data:
        value = _CRC8[value ^ byte]
    return value


def _searched(file: Readable, size: int, mark: re.Pattern[bytes]) -> list[int]:
    found: list[int] = []
    for place in range(0, size, _READ_BYTES):
        data = _at(file, place, _READ_BYTES + _LONGEST_MARK)
        found += [place + match.start() for match in mark.finditer(data) if match.start() < _READ_BYTES]
    if mark is _OGG:  # streams that begin together, such as a film's, are one recording
        found = [at for at, before in zip(found, [-1, *found], strict=False) if at != _page_end(file, before)]
    return found


def _page_end(file: Readable, place: int) -> int:
    """The byte behind an Ogg page (RFC 3533, section 6)."""
    if place < 0:
        return -1
    header = _at(file, place, 27 + 255)
    segments = header[26] if len(header) > 26 else 0
    return place + 27 + segments + sum(header[27 : 27 + segments])
