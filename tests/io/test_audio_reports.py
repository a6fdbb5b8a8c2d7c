"""Inputs of public bug reports of audio libraries, each made here; the report stands in the docstring."""

import io
import logging
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np
import pytest

from sounds import agrees, coded, muxed, tone
from speechdistill.io import audio
from speechdistill.io.audio import SAMPLE_RATE, load, probe
from speechdistill.io.errors import AudioError

Write = Callable[[str, bytes], str]
PCM = audio.quantise(tone(2.0))
INFO = b"INFOISFT\x0e\0\0\0Lavf58.29.100\0"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


def riff(*chunks: tuple[bytes, bytes], pad: bytes = b"\0") -> bytes:
    body = b"WAVE"
    for name, data in chunks:
        body += name + struct.pack("<I", len(data)) + data + pad * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def form(bits: int, block: int, valid: int | None = None) -> tuple[bytes, bytes]:
    """A mono `fmt ` chunk, an extensible one with `valid` bits."""
    tag = 1 if valid is None else 0xFFFE
    fields = struct.pack("<HHIIHH", tag, 1, SAMPLE_RATE, SAMPLE_RATE * block, block, bits)
    guid = bytes.fromhex("0100000000001000800000aa00389b71")
    return b"fmt ", fields + (b"" if valid is None else struct.pack("<HHI", 22, valid, 4) + guid)


def wide(width: int) -> bytes:
    """2 s in samples of 3 or 4 bytes."""
    samples = (tone(2.0) * 2147483647.0).astype("<i4")
    return samples.view(np.uint8).reshape(-1, 4)[:, 4 - width :].tobytes()


def test_a_long_chunk_of_zeros_in_front(write: Write) -> None:
    """libsndfile#542 and #370: recorders of Zoom leave a LIST chunk of 384 KiB of zeros; a file without samples."""
    data = riff(form(16, 2), (b"LIST", bytes(393_164)), (b"data", PCM.tobytes()))
    np.testing.assert_array_equal(agrees(write("a.wav", data), 2.0), PCM / np.float32(32_768))


@pytest.mark.parametrize("pad", [b"\0", b"Q", b""])
def test_the_pad_of_an_odd_chunk(write: Write, pad: bytes) -> None:
    """libsndfile#61, #331 and #887, BWFMetaEdit#155: left out or no zero, so that the next chunk is misread."""
    data = riff(form(24, 3), (b"data", wide(3)[:-3]), (b"LIST", INFO), pad=pad)
    agrees(write("a.wav", data), 2.0 - 1 / SAMPLE_RATE)
    agrees(write("b.wav", data + data), 4.0 - 2 / SAMPLE_RATE)


@pytest.mark.parametrize("valid", [16, 20, 24, 32])
def test_fewer_valid_bits_than_a_sample_has(write: Write, valid: int) -> None:
    """xiph/flac#301: read as samples of so many bits, which is noise."""
    for bits in (24, 32):
        if valid <= bits:
            path = write("a.wav", riff(form(bits, bits // 8, valid), (b"data", wide(bits // 8))))
            np.testing.assert_allclose(agrees(path, 2.0), tone(2.0), atol=1e-6)


def test_samples_narrower_than_their_block_are_refused(write: Write) -> None:
    """pytorch/audio#3762 and alsa-utils#260: 24 bits in 4 bytes, of which one reader makes 3/4 of another's frames."""
    with pytest.raises(AudioError, match="24 bits a sample, but 4 bytes for 1; export it again"):
        probe(write("a.wav", riff(form(24, 4), (b"data", wide(4)))))
    agrees(write("b.wav", riff(form(12, 2), (b"data", PCM.tobytes()))), 2.0)


@pytest.mark.parametrize("tags", [(2_000,), (300_000, 2_000), (2_000, 0)])
def test_several_tags_and_padding_in_front(write: Write, tags: tuple[int, ...]) -> None:
    """getID3#209, python-audio-tools#20, l-smash#61: no MP3 is found behind the first tag."""
    mp3 = muxed("mp3", "libmp3lame", tone(2.0), SAMPLE_RATE)
    front = b""
    for size in tags:
        length = bytes(size >> 7 * i & 0x7F for i in (3, 2, 1, 0))
        front += b"ID3\x03\0\0" + length + b"TIT2".ljust(size, b"\0") if size else bytes(30_000)
    agrees(write("a.mp3", front + mp3), 2.0, 0.1)  # not every decoder reads the padding in LAME's tag


def test_what_is_no_audio_at_all_is_named(write: Write) -> None:
    """CREMA-D#3, DNS-Challenge#6, #9 and #23: clones without git-lfs hold pointers; a download may be a web page."""
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:c6f94b25\nsize 72862\n"
    with pytest.raises(AudioError, match=r"pointer of Git LFS.*run `git lfs pull`"):
        load(write("a.wav", pointer))
    with pytest.raises(AudioError, match=r"a web page.*download it again"):
        load(write("b.mp3", b"\n<!DOCTYPE html><html><title>404</title>" + bytes(5000)))


def ogg_with(data: bytes, position: Callable[[int], int]) -> bytes:
    """Pages with other granule positions (RFC 3533, section 6)."""
    found = b""
    for page in map(bytearray, _pages(data)):
        page[6:14] = struct.pack("<q", position(struct.unpack("<q", page[6:14])[0]))
        page[22:26] = bytes(4)
        page[22:26] = struct.pack("<I", _checksum(page))
        found += page
    return found


def _pages(data: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(data):
        segments = data[place + 26]
        end = place + 27 + segments + sum(data[place + 27 : place + 27 + segments])
        yield data[place:end]
        place = end


def _checksum(page: bytes) -> int:
    value = 0
    for byte in page:
        value ^= byte << 24
        for _ in range(8):
            value = (value << 1 ^ 0x04C11DB7 if value & 0x80000000 else value << 1) & 0xFFFFFFFF
    return value


@pytest.mark.parametrize("subtype", ["OPUS", "VORBIS"])
def test_a_recording_of_a_running_stream(write: Write, subtype: str) -> None:
    """MPD#973, libsndfile#556: positions that begin an hour late."""
    late = 3600 * (48_000 if subtype == "OPUS" else SAMPLE_RATE)
    path = write("a.ogg", ogg_with(coded(tone(4.0), "OGG", subtype), lambda at: at + late if at > 0 else at))
    agrees(path, 4.0, 0.03)


def test_pages_that_are_missing_are_told(write: Write) -> None:
    """wasm-audio-decoders#4, zello-channel-api#155: for lost pages decoders invent sound, up to seconds of it."""
    pages = list(_pages(muxed("ogg", "libopus", tone(4, rate=48_000), 48_000, {"page_duration": "200000"})))
    with pytest.raises(AudioError, match="5 pages are missing before byte"):
        probe(write("a.opus", b"".join(pages[:10] + pages[15:])))
    agrees(write("b.opus", b"".join(pages)), 4.0)
    agrees(write("c.opus", b"".join(pages[:2] + pages[12:])), 2.0, 0.5)  # cut out of a running stream


def test_opus_without_positions_is_refused(write: Write) -> None:
    """concentus#47, VorbisJava#26: all positions are 0; FFmpeg drops the last second without a word."""
    opus = coded(tone(4.0), "OGG", "OPUS")
    with pytest.raises(AudioError, match="granule positions of its pages are 0"):
        probe(write("a.opus", ogg_with(opus, lambda _: 0)))
    agrees(write("b.opus", ogg_with(opus, lambda at: at)), 4.0)


def test_edit_lists_and_fragments(write: Write) -> None:
    """jellyfin#17543, mp4parse-rust#404: an edit list that cuts the recording, or states no length."""
    whole = bytearray(muxed("ipod", "aac", tone(4, rate=48_000), 48_000))
    place = whole.find(b"elst") + 12
    duration, begin = struct.unpack(">II", whole[place : place + 8])
    whole[place : place + 8] = struct.pack(">II", duration // 2, begin + 48_000)
    agrees(write("a.m4a", bytes(whole)), 2.0, 0.022)
    fragments = {"movflags": "empty_moov+delay_moov"}
    agrees(write("b.m4a", muxed("mp4", "aac", tone(3, rate=48_000), 48_000, fragments)), 3.0, 0.022)


def test_opus_in_mp4(write: Write) -> None:
    """pytorch/audio#3731, pyannote-audio#1724: the header's number of frames is 5,674 for minutes."""
    agrees(write("a.m4a", muxed("mp4", "libopus", tone(3, rate=48_000), 48_000)), 3.0, 0.022)


def test_a_damaged_frame_of_flac_is_told_by_sections_too(write: Write) -> None:
    """xiph/flac#209 and #464: behind a seek into the frame there is silence without an error."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(8 * SAMPLE_RATE).astype(np.float32)
    data = bytearray(coded(noise, "FLAC"))
    data[len(data) // 2] ^= 0xFF
    path = write("a.flac", bytes(data))
    for section in ((0, None), (62_000, 4_000), (64_000, 4_000)):
        with pytest.raises(AudioError, match="corrupt"):
            load(path, *section)
    assert np.abs(load(path, 100_000, 20_000)).max() > 0.3


def test_several_audio_streams_are_told(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    """bazarr#3103: of a film in two languages one is taken without a word."""
    data = io.BytesIO()
    with av.open(data, "w", format="matroska") as container:
        streams = [container.add_stream("pcm_s16le", rate=SAMPLE_RATE, layout="mono") for _ in range(2)]
        for stream, seconds in zip(streams, (2.0, 3.0), strict=True):
            frame = av.AudioFrame.from_ndarray(audio.quantise(tone(seconds))[None], "s16", "mono")
            frame.rate, frame.pts = SAMPLE_RATE, 0
            container.mux(stream.encode(frame))
    path = write("a.mka", data.getvalue())
    with caplog.at_level(logging.WARNING):
        agrees(path, 2.0)
    assert "only the first of its 2 audio streams is used" in caplog.text and path in caplog.text
