"""The length of a file is what decoding gives: headers that promise more or less, streams in a row, pauses."""

import io
import logging
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from sounds import agrees, coded, film, muxed, tone, wav
from speechdistill.io import audio, audio_streams
from speechdistill.io.audio import SAMPLE_RATE, load, probe
from speechdistill.io.errors import AudioError

Write = Callable[[str, bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, data: bytes) -> str:
        (tmp_path / name).write_bytes(data)
        return str(tmp_path / name)

    return write


# Sizes in headers


@pytest.mark.parametrize(
    "size", [0, 2_000_000_000, 0x7FFFF000, 0x7FFFFFFF, 0x7FFFFFFF - 44, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF - 36]
)
def test_placeholder_sizes_of_streaming_writers_are_not_believed(write: Write, size: int) -> None:
    pcm = audio.quantise(tone(1.3))
    whole = agrees(write("a.wav", wav(pcm.tobytes(), size)), 1.3)
    np.testing.assert_array_equal(whole, pcm / np.float32(32_768))


def test_a_header_alone_has_no_samples(write: Write) -> None:
    with pytest.raises(AudioError, match="no samples"):
        load(write("a.wav", wav(b"", 0)))


@pytest.mark.parametrize("more", [b"data" + struct.pack("<I", 32_000), b""])
def test_samples_behind_what_the_header_knows_are_told(write: Write, more: bytes) -> None:
    """A second part, or a size that wrapped at 4 GiB."""
    pcm = audio.quantise(tone(1.0)).tobytes()
    with pytest.raises(AudioError, match="leaves out"):
        load(write("a.wav", wav(pcm, len(pcm)) + more + pcm))
    agrees(write("b.wav", wav(pcm, len(pcm)) + b"LIST" + struct.pack("<I", 4) + b"INFO" + bytes(100)), 1.0)
    agrees(write("c.wav", wav(pcm, len(pcm)) + b"ID3\x03\x00\x00\x00\x00\x00\x10" + bytes(16)), 1.0)


def test_a_file_that_ends_midway_is_told_by_its_header_alone(write: Write) -> None:
    ogg, mp3 = coded(tone(9), "OGG", "OPUS"), muxed("mp3", "libmp3lame", tone(9), SAMPLE_RATE)
    for data in (ogg, mp3):
        with pytest.raises(AudioError, match="truncated"):
            probe(write("a.bin", data[: len(data) // 2]))


@pytest.mark.parametrize("form", ["WAV", "FLAC", "AIFF", "OGG"])
def test_a_tag_in_front_is_skipped(write: Write, form: str) -> None:
    data = coded(tone(2.0), form)
    tag = b"ID3\x03\x00\x00\x00\x00\x10\x00" + bytes(2048)
    np.testing.assert_array_equal(agrees(write("a.bin", tag + data), 2.0), load(write("b.bin", data)))


def test_mp3_in_wav_is_read_by_the_decoder_that_can(write: Write) -> None:
    path = write("a.wav", muxed("wav", "libmp3lame", tone(2.0), SAMPLE_RATE))
    assert soundfile.info(path).subtype == "MPEG_LAYER_III"
    agrees(path, 2.0, 0.2)  # with the codec's padding


# Recordings in a row


FORMS = [("WAV", None), ("AIFF", None), ("FLAC", None), ("OGG", "VORBIS"), ("OGG", "OPUS")]


@pytest.mark.parametrize(("form", "subtype"), FORMS)
def test_concatenated_files_are_read_to_the_end(write: Write, form: str, subtype: str | None) -> None:
    parts = [coded(tone(seconds, pitch), form, subtype) for seconds, pitch in ((1.0, 300), (2.5, 500), (1.5, 700))]
    whole = agrees(write("a.bin", b"".join(parts)), 5.0)
    alone = np.concatenate([load(write("b.bin", part)) for part in parts])
    np.testing.assert_array_equal(whole, alone)
    across = load(write("a.bin", b"".join(parts)), 12_000, 40_000)
    np.testing.assert_allclose(across, alone[12_000:52_000], atol=0.01)


@pytest.mark.parametrize("same", [True, False])
def test_long_concatenated_flacs_are_told_without_reading_all(write: Write, same: bool) -> None:
    """A tail that does not fit the header, or a middle that is not half way."""
    noise = 0.1 * np.random.default_rng(0).standard_normal(20 * SAMPLE_RATE).astype(np.float32)
    first = coded(noise, "FLAC")
    second = first if same else coded(noise[::-2], "FLAC")
    path = write("a.flac", first + second)
    assert probe(path).duration_s == (40.0 if same else 30.0)
    file = CountingBytes(first)
    assert audio_streams.layout(file, len(first), first[:4096]).starts == [0]
    assert file.count < len(first) / 4


class CountingBytes(io.BytesIO):
    count = 0

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(size)
        self.count += len(data)
        return data


@pytest.mark.parametrize("xing", ["1", "0"])
@pytest.mark.parametrize("id3", ["4", "0"])
def test_concatenated_mp3s_are_read_to_the_end(write: Write, xing: str, id3: str) -> None:
    options = {"write_xing": xing, "id3v2_version": id3}
    parts = [muxed("mp3", "libmp3lame", tone(seconds), SAMPLE_RATE, options) for seconds in (2.0, 3.0)]
    agrees(write("a.mp3", b"".join(parts)), 5.0, 0.3)


@pytest.mark.parametrize(("form", "codec"), [("ipod", "aac"), ("webm", "libopus"), ("asf", "wmav2")])
def test_concatenated_containers_are_read_to_the_end(write: Write, form: str, codec: str) -> None:
    parts = [muxed(form, codec, tone(seconds, rate=48_000), 48_000) for seconds in (2.0, 3.0)]
    agrees(write("a.bin", b"".join(parts)), 5.0, 0.2)


def test_recordings_of_several_rates_in_a_row_are_refused(write: Write) -> None:
    path = write("a.flac", coded(tone(1), "FLAC") + coded(tone(1, rate=8_000), "FLAC", rate=8_000))
    with pytest.raises(AudioError, match=r"byte \d+ has another sample rate"):
        load(path)


# Pictures and pauses


@pytest.mark.parametrize("form", ["matroska", "mp4"])
def test_a_longer_picture_does_not_decide(write: Write, form: str) -> None:
    path = write("a.bin", film(form, "aac", [(0.0, tone(2, rate=48_000))], 48_000, picture_s=4.0))
    agrees(path, 2.0, 0.1)


@pytest.mark.parametrize("form", ["matroska", "mp4"])
def test_pauses_and_late_starts_are_silence(write: Write, form: str) -> None:
    parts = [(1.5, tone(1, rate=48_000)), (4.0, tone(1, rate=48_000))]
    codec = "pcm_s16le" if form == "matroska" else "aac"
    whole = agrees(write("a.bin", film(form, codec, parts, 48_000, picture_s=6.0)), 5.0, 0.1)
    loud = np.abs(whole[: 5 * SAMPLE_RATE].reshape(-1, 1600)).max(1) > 0.1  # tenths of a second
    assert np.flatnonzero(loud).tolist() == [*range(15, 25), *range(40, 50)] or loud[[16, 23, 41, 48]].all()
    assert not loud[[3, 10, 13, 27, 33, 38]].any()


def test_a_jump_of_hours_is_refused(write: Write) -> None:
    parts = [(0.0, tone(1, rate=48_000)), (7200.0, tone(1, rate=48_000))]
    with pytest.raises(AudioError, match=r"timestamps jump by 7199 s"):
        load(write("a.mka", film("matroska", "pcm_s16le", parts, 48_000, picture_s=0.0)))


# Channels


@pytest.mark.parametrize("gain", [0.999, 0.95])
def test_channels_that_cancel_leave_the_loudest(write: Write, gain: float, caplog: pytest.LogCaptureFixture) -> None:
    wave = tone(2)
    path = write("a.wav", coded(np.stack([-gain * wave, wave], 1), "WAV", "FLOAT"))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(load(path, 100, 20_000), wave[100:20_100])
    assert "channel 1, the loudest" in caplog.text and path in caplog.text


def test_channels_with_different_talkers_are_averaged(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    wave = np.stack([tone(1, 300), tone(1, 470)], 1)
    np.testing.assert_allclose(load(write("a.wav", coded(wave, "WAV", "FLOAT"))), wave.mean(1), atol=1e-6)
    assert not caplog.text
