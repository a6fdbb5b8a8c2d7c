"""Several files in one: what follows the first is read, or refused with the reason; tags behind it are no file."""

import random
import struct
from collections.abc import Callable
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from sounds import agrees, coded, in_all_formats, muxed, tone
from speechdistill.io.audio import SAMPLE_RATE, load, probe
from speechdistill.io.errors import AudioError

Write = Callable[[str, bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


FILES = in_all_formats(2.0)


def _format(name: str) -> str:
    return name.split("-", maxsplit=1)[0]


@pytest.mark.parametrize("first", FILES)
def test_a_file_of_another_format_behind_is_told(write: Write, first: str) -> None:
    for second in FILES:
        if _format(second) == _format(first):
            continue
        path = write("a.bin", FILES[first] + FILES[second])
        reason = rf"{len(FILES[second]):,} bytes after the end of its {_format(first)} .* \({_format(second)}\)"
        for read in (probe, load):
            with pytest.raises(AudioError, match=reason):
                read(path)


def test_long_files_of_other_formats_are_told(write: Write) -> None:
    """Behind more than is searched whatever it is."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(20 * SAMPLE_RATE).astype(np.float32)
    for form, second in product(("WAV", "FLAC", "OGG"), ("MP3-bare", "Ogg", "MP4")):
        data = coded(noise, form)
        assert len(data) > 1 << 18 or form == "OGG"
        if (form, second) != ("OGG", "Ogg"):
            with pytest.raises(AudioError, match=f"another file .{_format(second)}"):
                probe(write("a.bin", data + FILES[second]))


@pytest.mark.parametrize("size", [0, 0x7FFFFFFF, 0xFFFFFFFF])
def test_behind_a_size_that_is_not_known_too(write: Write, size: int) -> None:
    streamed = {"WAV": (40, "<I", FILES["WAV"]), "AU": (8, ">I", FILES["AU"])}
    for place, layout, data in streamed.values():
        data = data[:place] + struct.pack(layout, size) + data[place + 4 :]
        agrees(write("a.bin", data), 2.0)
        agrees(write("a.bin", data + data), 4.0)
        with pytest.raises(AudioError, match=r"another file .FLAC"):
            load(write("a.bin", data + FILES["FLAC"]))


@pytest.mark.parametrize("name", ["AU", "CAF", "W64", "NIST", "VOC", "WAV-rf64"])
def test_joined_files_of_rare_formats_are_read_to_the_end(write: Write, name: str) -> None:
    alone = load(write("a.bin", FILES[name]))
    joined = agrees(write("b.bin", FILES[name] * 3), 6.0)
    np.testing.assert_array_equal(joined, np.tile(alone, 3))


def _ape(content: bytes) -> bytes:
    mark = struct.pack("<8sIII", b"APETAGEX", 2000, len(content) + 32, 1)
    return mark + struct.pack("<I8x", 0xA0000000) + content + mark + struct.pack("<I8x", 0x80000000)


LYRICS = b"LYRICSBEGININD0000200LYR00010la la la 1"
ID3V1 = b"TAG" + b"Title".ljust(125, b"\0")
COVER = random.Random(0).randbytes(90_000)
TAGS = {
    "ID3v1": ID3V1,
    "APE": _ape(b"\x05\0\0\0\0\0\0\0Title\0Hello"),
    "APE with a picture, ID3v1": _ape(COVER) + ID3V1,
    "Lyrics3v2, ID3v1": LYRICS + b"%06dLYRICS200" % len(LYRICS) + ID3V1,
    "ID3v2": b"ID3\x04\0\0\0\0\x10\0TIT2" + bytes(2044),
    "zeros": bytes(5000),
    "chunk": b"LIST\x1a\0\0\0INFOISFT\x0e\0\0\0Lavf58.29.100\0",
}


@pytest.mark.parametrize("tag", TAGS)
def test_tags_behind_a_file_change_nothing(write: Write, tag: str) -> None:
    for name, data in FILES.items():
        alone = load(write("a.bin", data))
        tagged = agrees(write("b.bin", data + TAGS[tag]), len(alone) / SAMPLE_RATE)
        np.testing.assert_array_equal(tagged, alone, err_msg=name)


def test_flac_in_other_containers_is_no_second_file(write: Write) -> None:
    """Matroska and Ogg keep the header of FLAC with its marker."""
    for form in ("matroska", "ogg"):
        agrees(write("a.bin", muxed(form, "flac", tone(2.0), SAMPLE_RATE)), 2.0, 0.1)
