"""Marks at the beginning of audio files, to detect a file that follows another one.

A mark inside another file must not count: Matroska, for example, keeps the header of FLAC audio, mark included. A FLAC
mark therefore counts only if a frame follows its header. MP3 and AAC, which have no mark, count only as a chain of
frames.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

from speechdistill.io.tar_files import Readable

HEADER_BYTES = 1 << 12
_READ_BYTES = 1 << 22
_OVERLAP_BYTES = 1 << 15  # longer than the longest mark, and than a chain of the largest ADTS frames
_CHAIN = 4  # MPEG frames in a row whose headers agree: by chance in one of 10^15 places


class Mark(NamedTuple):
    """Beginning of a file of format `kind` at byte `place`."""

    place: int
    kind: str


# Format: bytes to search for, number of bytes before them, pattern of the beginning of the file.
_MARKS = {
    "FLAC": (b"fLaC", 0, rb"fLaC[\x00\x80]\x00\x00\x22"),  # RFC 9639, section 8: STREAMINFO of 34 bytes
    "Ogg": (b"OggS\x00", 0, rb"OggS\x00[\x02\x06]"),  # RFC 3533, section 6: a page that begins a stream
    "AMR": (b"#!AMR", 0, rb"#!AMR(?:-WB)?\n"),  # RFC 4867, section 5
    "Matroska": (b"\x1aE\xdf\xa3", 0, rb"\x1aE\xdf\xa3.{4,40}?(?:matroska|webm)"),
    "ASF": (b"\x30\x26\xb2\x75\x8e\x66\xcf\x11", 0, rb".{8}\xa6\xd9\x00\xaa\x00\x62\xce\x6c"),
    "WAV": (b"WAVE", 8, rb"(?:RIFF|RIFX|RF64|BW64).{4}WAVE"),
    "AIFF": (b"FORM", 0, rb"FORM.{4}AIF[FC]"),
    "MP4": (b"ftyp", 4, rb"\x00\x00.{2}ftyp[ -~]{4}"),  # ISO/IEC 14496-12, section 4.3
    "AU": (b".snd\x00", 0, rb"\.snd\x00\x00.{6}\x00\x00\x00[\x01-\x1b]\x00.{3}\x00\x00\x00[\x01-\x20]"),
    "CAF": (b"caff", 0, rb"caff\x00\x01\x00\x00desc"),
    "W64": (b"riff\x2e\x91\xcf\x11", 0, rb"riff\x2e\x91\xcf\x11\xa5\xd6\x28\xdb\x04\xc1\x00\x00"),
    "NIST": (b"NIST_1A", 0, rb"NIST_1A\n"),
    "VOC": (b"Creative Voice", 0, rb"Creative Voice File\x1a"),
    "WavPack": (b"wvpk", 0, rb"wvpk.{4}[\x02-\x10]\x04"),
    "MP3": (b"ID3", 0, rb"ID3[\x02-\x04]\x00[\x00-\xf0][\x00-\x7f]{4}(?=[A-Z]{3}[A-Z0-9])"),  # ID3v2.4, section 3.1
}
_BEGINNINGS = {kind: re.compile(pattern, re.DOTALL) for kind, (_, _, pattern) in _MARKS.items()}
_PLAIN = frozenset(_MARKS) - {"WavPack"} | {"AAC"}
"""Formats in which `search` takes frames of MPEG audio for another file: they have none, or only their own."""
_SYNC = re.compile(rb"\xff[\xe2-\xff]")
# kbit/s of MPEG-1 by layer (ISO/IEC 11172-3, section 2.4.2.3), and of both layers in MPEG-2 (ISO/IEC 13818-3).
_RATES = {
    2: (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
    3: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
}
_LOW_RATES = (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_SAMPLE_RATES = (44_100, 48_000, 32_000)


def kind(file: Readable, place: int) -> str:
    """Return the format of a file that begins at byte `place`; empty if the format is unknown."""
    head = at(file, place, HEADER_BYTES)
    for name, beginning in _BEGINNINGS.items():
        if beginning.match(head):
            return _checked(file, place, name)
    return _chain(head, 0, 2)


def search(file: Readable, begin: int, end: int, first: str) -> Iterator[Mark]:
    """Yield the files that begin between two bytes of a file of format `first`, in order."""
    for place in range(begin, end, _READ_BYTES):
        data = at(file, place, min(_READ_BYTES + _OVERLAP_BYTES, end - place))
        marks = [*_marked(data), *(_chained(data, first) if first in _PLAIN else ())]
        for start, name in sorted(marks):
            name = _checked(file, place + start, name)
            if start < _READ_BYTES and name:
                yield Mark(place + start, name)


def at(file: Readable, place: int, size: int) -> bytes:
    """Return up to `size` bytes from byte `place`."""
    file.seek(place)
    return file.read(size)


def behind_tags(file: Readable, place: int) -> int:
    """Return the first byte after the ID3v2 tags at byte `place`, one or several, and the padding after each."""
    while length := id3_end(at(file, place, 10)):
        place += length
        while (padding := at(file, place, HEADER_BYTES)) and not padding.strip(b"\0"):
            place += len(padding)
        place += len(padding) - len(padding.lstrip(b"\0"))
    return place


def id3_end(tag: bytes) -> int:
    """Return the length of the ID3v2 tag that `tag` begins with; 0 if there is none."""
    if not tag.startswith(b"ID3") or len(tag) < 10:
        return 0
    footer = 10 if tag[3] == 4 and tag[5] & 0x10 else 0
    return 10 + footer + sum((byte & 0x7F) << 7 * (3 - i) for i, byte in enumerate(tag[6:10]))  # section 6.2


def _marked(data: bytes) -> Iterator[tuple[int, str]]:
    for name, (literal, before, _) in _MARKS.items():
        place = data.find(literal)
        while place >= 0:
            if place >= before and _BEGINNINGS[name].match(data, place - before):
                yield place - before, name
            place = data.find(literal, place + 1)


def _chained(data: bytes, first: str) -> Iterator[tuple[int, str]]:
    """Yield the first chain of frames of another format."""
    for match in _SYNC.finditer(data):
        if (name := _chain(data, match.start(), _CHAIN)) and name != first:
            yield match.start(), name
            return


def _checked(file: Readable, place: int, name: str) -> str:
    """Return the format of the file that begins with a mark; empty if no file begins there."""
    if name == "MP3":  # a tag, perhaps at the end of a file, or AAC's
        frames = behind_tags(file, place)
        return _chain(at(file, frames, _OVERLAP_BYTES), 0, 2) if frames > place else name
    if name != "FLAC":
        return name
    block, last = place + 4, False
    while not last:
        head = at(file, block, 4)
        if len(head) < 4:
            return ""
        last, block = head[0] >= 0x80, block + 4 + int.from_bytes(head[1:], "big")
    return name if at(file, block, 2) in (b"\xff\xf8", b"\xff\xf9") else ""


def _chain(data: bytes, place: int, frames: int) -> str:
    """Return MP3 (any layer) or AAC if so many MPEG frames of one kind follow one another, else an empty text."""
    start = data[place + 1 : place + 2]
    first, length = _frame(data[place : place + 6])
    for _ in range(frames - 1):
        place += length
        following = data[place : place + 6]
        name, length = _frame(following)
        if not first or name != first or following[1:2] != start:
            return ""
    return first


def _frame(header: bytes) -> tuple[str, int]:
    """Return format and bytes of a frame of MPEG audio (ISO/IEC 11172-3) or ADTS (ISO/IEC 13818-7), else ("", 0)."""
    if len(header) < 6 or header[0] != 0xFF or header[1] < 0xE2:
        return "", 0
    if header[1] & 0xF6 == 0xF0:
        length = (header[3] & 3) << 11 | header[4] << 3 | header[5] >> 5
        return ("AAC", length) if header[2] >> 2 & 15 <= 12 and length > 7 else ("", 0)
    version, layer = header[1] >> 3 & 3, 4 - (header[1] >> 1 & 3)  # version: 3 is MPEG-1, 2 MPEG-2, 0 MPEG-2.5
    rate, sample_rate = header[2] >> 4, header[2] >> 2 & 3
    if version == 1 or layer not in (2, 3) or not 1 <= rate <= 14 or sample_rate == 3:
        return "", 0
    kbits = (_RATES[layer] if version == 3 else _LOW_RATES)[rate - 1]
    hertz = _SAMPLE_RATES[sample_rate] >> {3: 0, 2: 1, 0: 2}[version]
    slots = 72_000 if layer == 3 and version != 3 else 144_000
    return "MP3", slots * kbits // hertz + (header[2] >> 1 & 1)
