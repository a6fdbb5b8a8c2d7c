"""Frames of FLAC audio: check whether a file continues after the samples that its header counts."""

import re
from collections.abc import Iterator

from speechdistill.io.audio_marks import at, search
from speechdistill.io.tar_files import Readable

_FRAME_BYTES = 1 << 13  # contains the header of a frame if the file does not state their size


def goes_on(file: Readable, first: int, size: int, head: bytes) -> bool:
    """Whether the end of the last frame differs from the header, or the middle of the file is not about half way."""
    info = head[8:42]
    block, total = int.from_bytes(info[:2], "big"), int.from_bytes(info[13:18], "big") & (1 << 36) - 1
    if total == 0:
        return True
    length = max(_FRAME_BYTES, 2 * int.from_bytes(info[7:10], "big"))  # two of the largest frames
    *_, (start, samples) = [(-1, 0), *_frames(at(file, max(first, size - length), length), block)]
    if start + samples != total or any(search(file, max(first + 1, size - length), size, "FLAC")):
        return True
    middle, _ = next(_frames(at(file, (first + size) // 2, length), block), (total // 2, 0))
    return not 0.3 < middle / total < 0.7 and total > 2 * samples


def _frames(data: bytes, block: int) -> Iterator[tuple[int, int]]:
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
        length, more = _length(code, header[place : place + 2])
        rate = {12: 1, 13: 2, 14: 2}.get(header[2] & 0xF, 0)
        end = place + more + rate
        if end < 16 and _crc8(header[:end]) == header[end]:
            yield (number if header[1] & 1 else number * block), length


def _length(code: int, following: bytes) -> tuple[int, int]:
    """Return the samples of a frame, and the bytes of its header that hold the number (RFC 9639, section 9.1.1)."""
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
