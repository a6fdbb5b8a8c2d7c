"""Reading audio: every format by sections, every unusable file one clear error, storage bit for bit."""

import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import fsspec
import numpy as np
import pytest
import soundfile
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import butter, correlate, sosfilt

from speechdistill.io import audio, audio_files
from speechdistill.io.audio import SAMPLE_RATE, load, probe
from speechdistill.io.errors import AudioError

Write = Callable[..., str]


def noise(duration_s: float, rate: int = SAMPLE_RATE, channels: int = 1, seed: int = 0) -> np.ndarray:
    """Band noise, shape (frames, channels): its sections are unlike each other and survive every codec."""
    white = np.random.default_rng(seed).standard_normal((round(duration_s * rate), channels))
    band = butter(4, [100, min(3000, 0.4 * rate)], "bandpass", fs=rate, output="sos")
    return (0.2 * sosfilt(band, white, axis=0)).astype(np.float32)


def container(
    path: Path,
    form: str,
    codec: str,
    wave: np.ndarray,
    rate: int,
    options: dict[str, str] | None = None,
    bit_rate: int = 96_000,
) -> str:
    """A file made by PyAV from a wave of shape (frames, channels)."""
    layout = {1: "mono", 2: "stereo"}[wave.shape[1]]
    with av.open(path, "w", format=form, options=options or {}) as file:
        stream = file.add_stream(codec, rate=rate, layout=layout)
        stream.bit_rate = 12_200 if "amr" in codec else bit_rate
        file.start_encoding()
        context = stream.codec_context
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave.T), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, position = rate, 0, 0
        resampler = av.AudioResampler(context.format, layout, rate, frame_size=context.frame_size)
        for piece in resampler.resample(frame) + resampler.resample(None):
            piece.pts, position = position, position + piece.samples
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    return str(path)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a wave by soundfile (or bytes as they are) and returns the path."""

    def write(name: str, content: np.ndarray | bytes, rate: int = SAMPLE_RATE, **options: Any) -> str:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            options = {"format": path.suffix[1:].upper(), **options}
            channels = content.shape[1] if content.ndim == 2 else 1
            with path.open("wb") as raw, soundfile.SoundFile(raw, "w", rate, channels, **options) as file:
                for begin in range(0, len(content), 4096):  # libsndfile crashes on long Vorbis writes
                    file.write(content[begin : begin + 4096])
        return str(path)

    return write


def wav_header(data_bytes: int, rate: int = SAMPLE_RATE, channels: int = 1) -> bytes:
    fmt = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    return (
        b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + struct.pack("<I", 16) + fmt
        + b"data" + struct.pack("<I", data_bytes)
    )  # fmt: skip


# Formats, whole and by section


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_wav_subtypes_load_to_their_precision(write: Write, subtype: str) -> None:
    wave = noise(0.5)
    steps = {"PCM_U8": 2**-7, "PCM_16": 2**-15, "PCM_24": 2**-23, "ULAW": 0.02}
    path = write("a.wav", wave, subtype=subtype)
    assert np.abs(load(path) - wave[:, 0]).max() <= steps.get(subtype, 1e-9)
    assert load(path).dtype == np.float32


SOUNDFILE = [
    ("WAV", "PCM_16", 44_100, 2), ("WAV", "PCM_16", 48_000, 1), ("WAV", "PCM_16", 8_000, 1),
    ("WAV", "FLOAT", 11_025, 1), ("WAV", "PCM_16", 1_000, 1), ("WAV", "PCM_16", 44_101, 1),
    ("WAV", "GSM610", 8_000, 1), ("WAV", "IMA_ADPCM", 22_050, 1), ("FLAC", "PCM_16", 44_100, 2),
    ("FLAC", "PCM_24", 96_000, 1), ("MP3", "MPEG_LAYER_III", 44_100, 2), ("OGG", "VORBIS", 44_100, 1),
    ("OGG", "OPUS", 48_000, 1), ("AIFF", "PCM_16", 32_000, 1), ("AU", "ULAW", 8_000, 1),
    ("CAF", "ALAC_16", 44_100, 1), ("W64", "PCM_16", 22_050, 1), ("RF64", "PCM_16", 24_000, 1),
    ("NIST", "PCM_16", 16_000, 1),
]  # fmt: skip


@pytest.mark.parametrize(("form", "subtype", "rate", "channels"), SOUNDFILE)
def test_soundfile_formats_by_section(write: Write, form: str, subtype: str, rate: int, channels: int) -> None:
    wave = noise(6.3, rate, channels)
    path = write("a.bin", wave, rate, format=form, subtype=subtype)
    whole, info = load(path), probe(path)
    assert len(whole) == info.num_samples == info.num_frames * SAMPLE_RATE // rate
    assert abs(info.num_frames - len(wave)) <= 1024  # ADPCM fills its last block
    assert (info.sample_rate, info.channels) == (rate, channels)
    for start, num_samples in ((0, 16_000), (1, 4_001), (33_333, 48_000), (len(whole) - 777, 777)):
        section = load(path, start, num_samples)
        assert len(section) == num_samples
        np.testing.assert_allclose(section, whole[start : start + num_samples], atol=1e-6)


@pytest.mark.parametrize(
    ("form", "subtype", "rate", "gain"), [("MP3", "MPEG_LAYER_III", 44_100, 1.0), ("OGG", "VORBIS", 8_000, 0.01)]
)
def test_sections_of_low_bit_rates(write: Write, form: str, subtype: str, rate: int, gain: float) -> None:
    """MP3 frames that need bits of many before them, and a Vorbis page of more than 2 s at the end."""
    path = write("a.bin", gain * noise(20.3, rate), rate, format=form, subtype=subtype, compression_level=0.99)
    whole = load(path)
    for start in (*range(10_000, 320_000, 50_001), len(whole) - 5_637, len(whole) - 3_336):
        np.testing.assert_allclose(load(path, start, 300), whole[start : start + 300], atol=1e-6)


AV = {
    "aac.m4a": ("ipod", "aac", 44_100, 2, {}),
    "faststart.mp4": ("mp4", "aac", 48_000, 1, {"movflags": "faststart"}),
    "fragments.mp4": ("mp4", "aac", 48_000, 1, {"movflags": "dash", "frag_duration": "1000000"}),
    "adts.aac": ("adts", "aac", 44_100, 1, {}),
    "alac.m4a": ("ipod", "alac", 44_100, 1, {}),
    "amr_nb.amr": ("amr", "libopencore_amrnb", 8_000, 1, {}),
    "amr_nb.3gp": ("3gp", "libopencore_amrnb", 8_000, 1, {}),
    "opus.webm": ("webm", "libopus", 48_000, 2, {}),
    "no_duration.webm": ("webm", "libopus", 48_000, 1, {"live": "1"}),
    "aac.mka": ("matroska", "aac", 44_100, 1, {}),
    "wmav2.wma": ("asf", "wmav2", 44_100, 1, {}),
    "mp2.mp2": ("mp2", "mp2", 44_100, 1, {}),
    "no_xing_tag.mp3": ("mp3", "libmp3lame", 44_100, 1, {"write_xing": "0"}),
    "aac.ts": ("mpegts", "aac", 44_100, 1, {}),
    "flac.ogg": ("ogg", "flac", 44_100, 1, {}),
}
NOISY_DECODERS = (
    "aac",
    "faststart",
    "fragments",
    "adts",
    "mp2",
)  # noise substitution, dither: 1e-2 after a seek


@pytest.mark.parametrize("name", AV)
def test_pyav_formats_by_section(tmp_path: Path, name: str) -> None:
    form, codec, rate, channels, options = AV[name]
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no encoder {codec}")
    wave = noise(9.2, rate, channels)
    path = container(tmp_path / name, form, codec, wave, rate, options)
    whole, info = load(path), probe(path)
    assert len(whole) == info.num_samples
    assert abs(info.duration_s - 9.2) < 0.1
    assert (info.sample_rate, info.channels) == (rate, channels)
    reference = audio.resample(wave.mean(1), rate)
    delay = best_lag(reference[16_000:80_000], whole[16_000:80_000], 2_500)
    assert abs(delay) < 1_100, "the codec's own delay is below 70 ms"
    for start in (777, 60_001, 100_000, len(whole) - 30_000):
        section = load(path, start, 24_000)
        assert len(section) == 24_000
        expected = whole[start : start + 24_000]
        assert best_lag(expected, section, 300) == 0
        tolerance = 0.05 if name.startswith(NOISY_DECODERS) else 1e-4
        np.testing.assert_allclose(section, expected, atol=tolerance)
        np.testing.assert_array_equal(section, load(path, start, 24_000))


@pytest.mark.parametrize(("form", "codec"), [("mp3", "libmp3lame"), ("adts", "aac")])
def test_streams_whose_bit_rate_says_nothing(tmp_path: Path, write: Write, form: str, codec: str) -> None:
    """Two bit rates in a row, without an index: FFmpeg's own guesses of length and place are seconds off."""
    options = {"write_xing": "0", "id3v2_version": "0"} if form == "mp3" else {}
    parts = []
    for duration_s, bit_rate in ((10, 192_000), (20, 48_000)):
        wave = noise(duration_s, 44_100, seed=duration_s)
        parts.append(Path(container(tmp_path / "a", form, codec, wave, 44_100, options, bit_rate)).read_bytes())
    path = write("a.bin", b"".join(parts))
    whole = load(path)
    assert abs(len(whole) - 30 * SAMPLE_RATE) < 0.2 * SAMPLE_RATE
    for start in (100_000, 200_000, 400_000):
        assert best_lag(whole[start : start + 24_000], load(path, start, 24_000), 1_000) == 0


def best_lag(reference: np.ndarray, wave: np.ndarray, largest: int) -> int:
    """By how many samples `wave` comes after `reference`."""
    products = correlate(wave, reference, "full", "fft")
    middle = len(reference) - 1
    return int(np.argmax(products[middle - largest : middle + largest + 1])) - largest


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3_000), st.sampled_from([8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 44_101]), st.data())
def test_any_section_of_any_length(
    tmp_path_factory: pytest.TempPathFactory, frames: int, rate: int, data: st.DataObject
) -> None:
    path = str(tmp_path_factory.mktemp("section") / "a.wav")
    soundfile.write(path, noise(1, rate)[:frames], rate)
    length = frames * SAMPLE_RATE // rate
    if length == 0:
        with pytest.raises(AudioError, match="no samples"):
            load(path)
        return
    start = data.draw(st.integers(0, length - 1))
    num_samples = data.draw(st.integers(1, length - start))
    whole = load(path)
    assert len(whole) == length == probe(path).num_samples
    section = load(path, start, num_samples)
    np.testing.assert_allclose(section, whole[start : start + num_samples], rtol=0, atol=1e-6)


def test_a_section_to_the_end(write: Write) -> None:
    path = write("a.wav", noise(1, 44_100), 44_100)
    assert len(load(path, 5_000)) == 11_000


@pytest.mark.parametrize(("start", "num_samples"), [(16_000, 1), (15_000, 1_001), (-1, 100), (0, 0), (20_000, None)])
def test_sections_outside_the_file(write: Write, start: int, num_samples: int | None) -> None:
    path = write("a.wav", noise(1))
    with pytest.raises(AudioError, match="16000 samples at 16 kHz"):
        load(path, start, num_samples)


def test_channels_are_averaged_or_chosen(write: Write) -> None:
    wave = noise(0.2, channels=3)
    path = write("a.wav", wave, subtype="FLOAT")
    np.testing.assert_allclose(load(path), wave.mean(1), atol=1e-7)
    np.testing.assert_array_equal(load(path, channel=2), wave[:, 2])
    for missing in (3, -1):
        with pytest.raises(AudioError, match=r"channel.*0\.\.2"):
            load(path, channel=missing)


def test_float_samples_above_one_are_kept(write: Write) -> None:
    wave = np.array([1.5, -7.0, 0.25], np.float32)
    np.testing.assert_array_equal(load(write("a.wav", wave, subtype="FLOAT")), wave)


def test_resampling_keeps_alignment_and_level(write: Write) -> None:
    for rate in (8_000, 44_100, 48_000):
        times = np.arange(rate) / rate
        path = write("a.wav", 0.5 * np.sin(2 * np.pi * 440 * times), rate, subtype="FLOAT")
        expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)
        np.testing.assert_allclose(load(path)[800:-800], expected[800:-800], atol=1e-5)


def test_long_files_are_spooled(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.flac", noise(3, 44_100, 2), 44_100)
    in_memory, section = load(path), load(path, 20_000, 16_000)
    monkeypatch.setattr(audio, "_SPOOL_SAMPLES", 1_000)
    assert isinstance(load(path), np.memmap)
    np.testing.assert_array_equal(load(path), in_memory)
    np.testing.assert_array_equal(load(path, 20_000, 16_000), section)


# Where files live


class CountingFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        self.fs.ranges.append((start, end))
        if (start, end) == self.fs.fails_at or self.fs.fails_at == "always":
            raise TimeoutError("the network is down")
        return bytes(self.fs.files[self.path][start:end])


class CountingFileSystem(AbstractFileSystem):
    """An object store in memory that counts what is transferred, and can fail."""

    protocol = "counting"
    files: dict[str, bytes] = {}  # noqa: RUF012
    ranges: list[tuple[int, int]] = []  # noqa: RUF012
    fails_at: Any = None

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        return {"name": path, "size": len(self.files[self._strip_protocol(path)]), "type": "file"}

    def _open(self, path: str, mode: str = "rb", **options: Any) -> CountingFile:
        return CountingFile(self, path, mode, **options)


@pytest.fixture
def counting() -> Iterator[type[CountingFileSystem]]:
    fsspec.register_implementation("counting", CountingFileSystem, clobber=True)
    yield CountingFileSystem
    CountingFileSystem.files.clear()
    CountingFileSystem.ranges.clear()
    CountingFileSystem.fails_at = None


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_a_section_reads_a_small_part_of_the_file(
    write: Write, counting: type[CountingFileSystem], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    rng = np.random.default_rng(0)
    pcm = rng.integers(-2_000, 2_000, 10 * 60 * SAMPLE_RATE, np.int16)
    path = write("long.bin", pcm, format=form)
    counting.files["long"] = Path(path).read_bytes()
    size = len(counting.files["long"])
    start = 400 * SAMPLE_RATE
    expected = pcm[start : start + 160_000] / np.float32(32_768)
    np.testing.assert_array_equal(load("counting://long", start, 160_000), expected)
    assert sum(end - begin for begin, end in counting.ranges) < 0.08 * size  # the section is 0.017 of it

    read: list[int] = []
    original = audio_files.Source.read
    monkeypatch.setattr(audio_files.Source, "read", lambda self, n=-1: read.append(len(d := original(self, n))) or d)
    np.testing.assert_array_equal(load(path, start, 160_000), expected)
    assert 0 < sum(read) < 0.08 * size


def test_urls(write: Write, counting: type[CountingFileSystem]) -> None:
    wave = noise(1)
    path = write("a.wav", wave, subtype="FLOAT")
    for name in ("a b.wav", "50%20#1?.wav", "[ab]*.wav", "ü.wav"):
        fsspec.filesystem("memory").pipe_file(f"/{name}", Path(path).read_bytes())
        np.testing.assert_array_equal(load(f"memory://{name}"), wave[:, 0])
    np.testing.assert_array_equal(load(f"file://{path}", 100, 50), wave[100:150, 0])
    for missing in ("memory://none.wav", "file:///none.wav", "nonsense://a.wav"):
        with pytest.raises(AudioError, match="cannot be read"):
            probe(missing)
    counting.files["empty"] = b""
    with pytest.raises(AudioError, match="0 bytes"):
        probe("counting://empty")


def test_a_storage_that_fails_is_named_as_the_cause(
    write: Write, counting: type[CountingFileSystem], tmp_path: Path
) -> None:
    counting.files["a"] = Path(write("a.flac", noise(60))).read_bytes()
    counting.files["b"] = Path(container(tmp_path / "b.m4a", "ipod", "aac", noise(60), 16_000)).read_bytes()
    for url in ("counting://a", "counting://b"):
        counting.ranges.clear()
        load(url)
        for fails_at in ("always", counting.ranges[-1]):
            counting.fails_at = fails_at
            with pytest.raises(AudioError, match="the network is down") as caught:
                load(url)
            assert isinstance(caught.value.__cause__, TimeoutError)
            counting.fails_at = None


NAMES = [
    "ü日本.wav", "new\nline.wav", " two  spaces .wav", "50%20.wav", "%d.wav", "a::b.wav", "#?.wav",
    "[a]*.wav", "~", "memory:x.wav", "-x.wav", "audio.raw", "list.m3u8", "quote'\".wav",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_work_as_local_paths(
    write: Write, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    wave = noise(0.1)
    path = write(name, wave, subtype="FLOAT", format="WAV")
    monkeypatch.chdir(tmp_path)
    for uri in (path, name, f"file://{path}"):
        np.testing.assert_array_equal(load(uri), wave[:, 0])


def test_names_that_are_not_utf8(write: Write) -> None:
    wave = noise(0.1)
    path = write("caf\udce9.wav", wave, format="WAV", subtype="FLOAT")
    np.testing.assert_array_equal(load(path), wave[:, 0])
    Path(path).write_bytes(b"no audio")
    with pytest.raises(AudioError) as caught:
        load(path)
    assert str(caught.value).encode()  # printable where the name is not


def test_things_that_are_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.wav")
    (tmp_path / "loop.wav").symlink_to("loop.wav")
    (tmp_path / "dangling.wav").symlink_to("nowhere")
    for name in ("", "fifo.wav", "loop.wav", "dangling.wav", "missing.wav", "nul\0.wav", "\ud800.wav"):
        for prefix in ("", "file://"):
            with pytest.raises(AudioError):
                probe(f"{prefix}{tmp_path}/{name}")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_no_permission(write: Write) -> None:
    path = write("a.wav", noise(0.1))
    Path(path).chmod(0)
    with pytest.raises(AudioError, match=r"PermissionError.*permissions"):
        load(path)


# Files that cannot be used


def corrupt_files() -> dict[str, tuple[bytes, str]]:
    nan, inf = np.zeros((2, 100), np.float32)
    nan[50], inf[99] = np.nan, -np.inf
    wave = wav_header(200) + bytes(200)
    float_header = wave.replace(
        struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16),
        struct.pack("<HHIIHH", 3, 1, 16_000, 64_000, 4, 32),
    )
    return {
        "zero bytes": (b"", "0 bytes"),
        "text": (b"This is a transcript, no audio at all.\n" * 50, "not audio"),
        "one byte": (b"R", "not audio"),
        "header only": (wav_header(0), "no samples"),
        "half a header": (wav_header(0)[:30], "not audio"),
        "NaN": (float_header[:40] + struct.pack("<I", 400) + nan.tobytes(), "NaN"),
        "infinite": (float_header[:40] + struct.pack("<I", 400) + inf.tobytes(), "NaN or infinite"),
        "0 Hz": (wav_header(200, rate=0) + bytes(200), "Hz|not audio"),
        "10 Hz": (wav_header(200, rate=10) + bytes(200), "10 Hz is outside 1000..768000 Hz"),
        "64 channels": (wav_header(25_600, channels=64) + bytes(25_600), "64 channels"),
        "claims 1.2 GB": (wav_header(1_234_567_890) + bytes(200), "truncated.*1234567890 bytes.*holds 200"),
        "truncated wav": (wav_header(400) + bytes(200), "truncated.*400 bytes.*holds 200"),
    }  # fmt: skip


@pytest.mark.parametrize("case", corrupt_files())
def test_unusable_bytes(write: Write, case: str) -> None:
    content, reason = corrupt_files()[case]
    path = write("a.wav", content)
    fsspec.filesystem("memory").pipe_file("/a.wav", content)
    for uri in (path, "memory://a.wav"):
        with pytest.raises(AudioError, match=reason) as caught:
            load(uri)
        assert caught.value.path == uri
        assert uri in str(caught.value)
        assert caught.value.fix


@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3", "AIFF", "AU", "W64", "RF64", "NIST"])
def test_truncated_soundfile_formats(write: Write, form: str) -> None:
    content = Path(write("a.bin", noise(3), format=form)).read_bytes()
    with pytest.raises(AudioError, match=r"truncated|corrupt"):
        load(write("b.bin", content[: len(content) // 2]))


@pytest.mark.parametrize(("form", "name"), [("ipod", "plain"), ("ipod", "faststart"), ("webm", "webm")])
def test_truncated_pyav_formats(tmp_path: Path, write: Write, form: str, name: str) -> None:
    codec = "libopus" if form == "webm" else "aac"
    options = {"movflags": "faststart"} if name == "faststart" else {}
    path = container(tmp_path / "a.bin", form, codec, noise(9, 48_000), 48_000, options)
    content = Path(path).read_bytes()
    cut = write("b.bin", content[: len(content) * 6 // 10])
    for section in ((0, None), (100_000, 16_000)):  # moov at the end: not audio at all
        with pytest.raises(AudioError, match=r"truncated|corrupt|not audio"):
            load(cut, *section)


def test_sizes_that_pipes_write_are_accepted(write: Write) -> None:
    samples = audio.quantise(noise(0.5)[:, 0])
    for size in (0xFFFFFFFF, 0x7FFFF000):
        path = write("a.wav", wav_header(size) + samples.tobytes())
        np.testing.assert_array_equal(load(path), samples / np.float32(32_768))


def test_flac_from_a_pipe_has_no_length_in_its_header(write: Write) -> None:
    wave = noise(3)
    content = bytearray(Path(write("a.flac", wave)).read_bytes())
    content[21] &= 0xF0  # RFC 9639, section 8.2: 36 bits of total samples, 0 if unknown
    content[22:26] = bytes(4)
    path = write("b.flac", bytes(content))
    np.testing.assert_array_equal(load(path), load(write("a.flac", wave)))
    np.testing.assert_array_equal(load(path, 40_000, 5_000), load(path)[40_000:45_000])


def test_a_hundred_hours_are_too_long(tmp_path: Path) -> None:
    path = tmp_path / "long.wav"
    with path.open("wb") as file:
        size = 100 * 3600 * 2_000
        file.write(wav_header(size, rate=1_000))
        file.truncate(44 + size)  # sparse
    with pytest.raises(AudioError, match=r"100\.0 h long"):
        probe(str(path))


def test_one_sample(write: Write) -> None:
    assert load(write("a.wav", np.array([0.5], np.float32))).tolist() == [0.5]


def test_playlists_are_not_followed(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write("target.wav", noise(3))
    monkeypatch.chdir(tmp_path)
    assert len(load("target.wav")) == 48_000
    for text in (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\n{target}\n#EXT-X-ENDLIST\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://{target}\n#EXT-X-ENDLIST\n",
        f"ffconcat version 1.0\nfile {target}\n",
        "ffconcat version 1.0\nfile target.wav\n",
    ):
        for name in ("list.wav", "list.m3u8", "list.ffconcat"):
            with pytest.raises(AudioError, match="not audio"):
                load(write(name, text.encode()))


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_load_or_raise_audio_error(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.getbasetemp()
    sources = folder / "damaged"
    if not sources.exists():
        sources.mkdir()
        for form in ("WAV", "FLAC", "MP3", "OGG"):
            soundfile.write(sources / form, noise(0.5, 22_050), 22_050, format=form)
        container(sources / "m4a", "ipod", "aac", noise(0.5, 22_050), 22_050)
        container(sources / "webm", "webm", "libopus", noise(0.5, 48_000), 48_000)
    content = bytearray(
        (sources / data.draw(st.sampled_from(["WAV", "FLAC", "MP3", "OGG", "m4a", "webm"]))).read_bytes()
    )
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = folder / "damaged.bin"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        wave = load(str(path))
    except AudioError as error:
        assert error.reason
        return
    assert wave.dtype == np.float32
    assert len(wave) == probe(str(path)).num_samples
    assert np.isfinite(wave).all()


def test_audio_error_survives_pickling() -> None:
    error = AudioError("a/b.wav", "empty", "leave it out")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), copy.path, copy.reason, copy.fix, str(copy)) == (
        AudioError, "a/b.wav", "empty", "leave it out", str(error),
    )  # fmt: skip


# Storage of samples


@pytest.mark.parametrize("audio_format", ["flac", "pcm16"])
def test_encoding_is_bit_exact(audio_format: str) -> None:
    full_scale = np.array([-32_768, 32_767, 0, 1, -1], np.int16)
    rng = np.random.default_rng(0)
    for pcm in (
        full_scale,
        rng.integers(-32_768, 32_768, 50_001).astype(np.int16),
        full_scale[:1],
        full_scale[:0],
    ):
        decoded = audio.decode(audio.encode(pcm, audio_format), audio_format)
        assert decoded.dtype == np.float32
        assert decoded.shape == pcm.shape
        np.testing.assert_array_equal(audio.quantise(decoded), pcm)


@pytest.mark.parametrize("audio_format", ["flac", "pcm16"])
@pytest.mark.parametrize(("start", "num_samples"), [(0, 1), (4_096, 4_096), (12_345, 20_000), (49_000, 5_000)])
def test_a_section_is_that_of_the_whole(audio_format: str, start: int, num_samples: int) -> None:
    pcm = np.random.default_rng(0).integers(-32_768, 32_768, 50_001).astype(np.int16)
    section = audio.decode(audio.encode(pcm, audio_format), audio_format, start, num_samples)
    np.testing.assert_array_equal(audio.quantise(section), pcm[start : start + num_samples])


def test_quantise_clips_and_rounds() -> None:
    wave = np.array([-1e9, -1.1, -1.0, -0.6 / 32_768, 0.4 / 32_768, 0.99999, 1.0, 3.0], np.float32)
    assert audio.quantise(wave).tolist() == [-32_768, -32_768, -32_768, -1, 0, 32_767, 32_767, 32_767]


def test_encode_and_decode_refuse_what_they_would_distort() -> None:
    with pytest.raises(TypeError, match="quantise first"):
        audio.encode(np.zeros(3, np.float32), "pcm16")
    for call in (lambda: audio.encode(np.zeros(3, np.int16), "mp3"), lambda: audio.decode(b"", "mp3")):
        with pytest.raises(ValueError, match="choose flac or pcm16"):
            call()
    whole = audio.encode(audio.quantise(noise(1)[:, 0]), "flac")
    for data, audio_format in ((whole[: len(whole) // 2], "flac"), (b"text", "flac"), (b"odd", "pcm16")):
        with pytest.raises(AudioError):
            audio.decode(data, audio_format)


def test_fit_and_resample() -> None:
    wave = np.arange(5, dtype=np.float32)
    assert audio.fit(wave, 3).tolist() == [0, 1, 2]
    assert audio.fit(wave, 7).tolist() == [0, 1, 2, 3, 4, 0, 0]
    assert audio.resample(wave, 16_000) is wave
    assert audio.resample(noise(1, 48_000)[:, 0], 48_000).shape == (16_000,)
    assert audio.resample(noise(1)[:, 0], 16_000, 8_000).dtype == np.float32


def test_versions_and_extensions() -> None:
    assert set(audio.codec_versions()) == {"libsndfile", "soxr", "av", "libavcodec"}
    assert all(audio.codec_versions().values())
    assert {".wav", ".flac", ".mp3", ".m4a", ".opus"} <= audio.EXTENSIONS
    assert all(suffix == suffix.lower() and suffix[0] == "." for suffix in audio.EXTENSIONS)


HOUR = """
import resource, sys
import numpy as np, soundfile
from speechdistill.io import audio
path = sys.argv[1]
block = np.tile((np.sin(np.arange(441) / 441 * 2 * np.pi) * 9_000).astype(np.int16)[:, None], (1_000, 2))
with soundfile.SoundFile(path, "w", 44_100, 2, "PCM_16", format="FLAC") as file:
    for _ in range(360):
        file.write(block)
audio.load(path, 0, 16_000)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
wave = audio.load(path)
assert len(wave) == 3_600 * 16_000, len(wave)
print(peak() - before)
"""


@pytest.mark.slow
def test_an_hour_loads_in_little_memory(tmp_path: Path) -> None:
    source_root = str(Path(audio.__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", HOUR, str(tmp_path / "hour.flac")],
        env={**os.environ, "PYTHONPATH": source_root}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(done.stdout) < 300, f"{done.stdout} MB above the baseline"
