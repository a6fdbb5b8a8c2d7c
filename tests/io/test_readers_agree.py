"""A file has one length and one wave, whichever command reads it, and that is what decoding gives."""

import io
import struct
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
import pyarrow as pa
import pytest

from sounds import coded, film, in_all_formats, muxed, tone, wav
from speechdistill.commands.score import score_files
from speechdistill.comparing import judged
from speechdistill.data import headers, scored_clips
from speechdistill.data.clips import Clips, clip_id
from speechdistill.data.degradation_recipes import as_is
from speechdistill.data.label_scale import LabelTransform
from speechdistill.data.plan import Plans
from speechdistill.io import audio, storage, table
from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.labelling import features
from speechdistill.labelling.samples import make_sample
from speechdistill.models.label import Label
from speechdistill.models.options import WHOLE_S


def decoded_s(data: bytes) -> float:
    """Seconds of audio in a file, as FFmpeg decodes it to its end."""
    with av.open(io.BytesIO(data)) as container:
        return sum(frame.samples / frame.sample_rate for frame in container.decode(audio=0))


def _cases() -> Iterator[tuple[str, bytes, float]]:
    """A name, a file, and its length in seconds."""
    once = in_all_formats(2.3)
    for name, data in once.items():
        # The padding of these codecs is not stated, or stays; FFmpeg leaves Vorbis' in, which Ogg states.
        length_s = decoded_s(data) if name in ("MP3-bare", "AAC", "MP4", "ASF") else 2.3
        yield name, data, length_s
        yield f"{name}, twice", data + data, 2 * length_s
    for rate in (8_000, 11_025, 44_100, 44_101, 48_000):
        yield f"{rate} Hz", coded(tone(1.777, rate=rate), "FLAC", rate=rate), round(1.777 * rate) / rate
    stereo = coded(np.stack([tone(2.1), tone(2.1, 500)], 1), "WAV", "FLOAT")
    yield "stereo", stereo, 2.1
    pcm = audio.quantise(tone(1.3)).tobytes()
    for size in (0, 0x7FFFFFFF, 0xFFFFFFFE, 2_000_000_000):
        yield f"WAV, size {size:x}", wav(pcm, size), 1.3
    au = once["AU"]
    for size in (0, 0xFFFFFFFF):
        yield f"AU, size {size:x}", au[:8] + struct.pack(">I", size) + au[12:], 2.3
    yield "tag in front", b"ID3\x03\0\0\0\0\x10\0" + bytes(2048) + once["FLAC"], 2.3
    yield "tag behind", once["MP3"] + b"TAG" + bytes(125), 2.3
    mp3 = muxed("wav", "libmp3lame", tone(2.0), SAMPLE_RATE)
    yield "MP3 in WAV", mp3, decoded_s(mp3)
    wide = tone(2, rate=48_000)
    for form in ("matroska", "mp4"):
        sound = decoded_s(film(form, "aac", [(0.0, wide)], 48_000, picture_s=0.0))
        yield f"longer picture, {form}", film(form, "aac", [(0.0, wide)], 48_000, picture_s=4.0), sound
    # Of Matroska only PCM: `load` says what a section behind a pause is else.
    for form, codec in (("matroska", "pcm_s16le"), ("mp4", "aac")):
        late = film(form, codec, [(1.5, wide), (5.0, wide)], 48_000, picture_s=6.0)
        yield f"late and with a pause, {form}", late, 7.0
    yield "more than a segment", coded(tone(20.2), "FLAC"), 20.2


CASES = list(_cases())
_TOLERANCE_S = {"late and with a pause": 1024 / 48_000}  # the last frame of AAC is padded


class _Lengths:
    """A teacher whose score of a wave is not asked for."""

    name, sha256 = "lengths", ""

    def label(self, waves: list[np.ndarray]) -> list[Label]:
        self.waves = waves
        return [Label.from_logits(np.zeros(1)) for _ in waves]


@pytest.mark.parametrize(("name", "data", "length_s"), CASES, ids=[name for name, _, _ in CASES])
def test_all_commands_read_the_same(tmp_path: Path, name: str, data: bytes, length_s: float) -> None:
    (tmp_path / "a.bin").write_bytes(data)
    uri = str(tmp_path / "a.bin")
    whole = audio.load(uri)
    assert len(whole) / SAMPLE_RATE == pytest.approx(length_s, abs=_TOLERANCE_S.get(name.split(",")[0], 1e-4))
    row = headers.clip({**_listed(uri), "clip_id": clip_id("speech", uri)})  # ingest
    manifest = f"{tmp_path}/clips.parquet"
    storage.publish(table.parquet_bytes(rows := table.from_rows([row], "clip.v1")), manifest)
    assert audio.probe(uri).num_samples == len(whole)
    for read in (_scored, _compared, _featured, _trained_on, _labelled):
        read(uri, whole, rows, manifest)


def _listed(uri: str) -> dict[str, object]:
    return {"uri": uri, "kind": "speech", "mos": 3.0, "dataset": "d", "split": "test"}


def _same(wave: np.ndarray, expected: np.ndarray) -> None:
    assert wave.shape == expected.shape
    np.testing.assert_allclose(wave, expected, atol=0.01)


def _scored(uri: str, whole: np.ndarray, rows: pa.Table, manifest: str) -> None:
    teacher = _Lengths()
    (row,) = score_files([uri], teacher)  # type: ignore[arg-type]
    assert (row["error"], row["duration_s"]) == (None, len(whole) / SAMPLE_RATE)
    _same(teacher.waves[0], whole)


def _compared(uri: str, whole: np.ndarray, rows: pa.Table, manifest: str) -> None:
    """`compare --clips` of a manifest."""
    (clip,) = judged.clips(manifest).clips
    _same(judged.read(clip.uri), whole)


def _featured(uri: str, whole: np.ndarray, rows: pa.Table, manifest: str) -> None:
    """The middle of a clip, of which a teacher is made, and on which pruning validates."""
    (result,) = features.Load(manifest)([{"id": 0}])
    assert isinstance(result, dict), result
    most = round(WHOLE_S * SAMPLE_RATE)
    start = max(0, len(whole) - most) // 2
    _same(np.frombuffer(result["wave"], np.float32), whole[start : start + most])


def _trained_on(uri: str, whole: np.ndarray, rows: pa.Table, manifest: str) -> None:
    """Crops of a clip that listeners scored, the first and the last that there are, and all of it in validation."""
    labeled = scored_clips.Labeled(rows, LabelTransform())
    assert [clip.num_samples for clip in labeled.clips()] == [len(whole)]
    for crop, crop_samples in ((0.0, 8_000), (1 - 1e-9, 8_000), (0.0, 10**9), (1 - 1e-9, 10**9)):
        wave, _, _ = labeled.read(0, crop, crop_samples)
        _same(wave, whole[:crop_samples] if crop == 0 else whole[-crop_samples:])
    assert len(scored_clips.held_out(manifest)) == 1


def _labelled(uri: str, whole: np.ndarray, rows: pa.Table, manifest: str) -> None:
    """Segments that cover a clip: the first begins where it does, the last ends there."""
    plans = Plans(as_is(), Clips(rows), seed=0)
    covered = np.zeros(len(whole), bool)
    for number in range(len(plans)):
        plan = plans[number]
        part = slice(plan.start, plan.start + plan.num_samples)
        _same(make_sample(plan)[0] / np.float32(32_768), np.clip(whole[part], -1, 1))
        covered[part] = True
    assert covered.all()
