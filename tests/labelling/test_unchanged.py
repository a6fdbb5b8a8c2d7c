"""Files that change between ingest and labelling are rejects with that reason."""

import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import soundfile

from manifests import corpus, row, voice
from speechdistill.data.clips import Clips
from speechdistill.data.degradation_recipes import as_is, weights_free
from speechdistill.io import audio, audio_files, storage, table, tar_files
from speechdistill.io.errors import AudioError
from speechdistill.labelling import features, samples


def ingested(folder: Path, uris: list[str]) -> str:
    """A manifest with the files' versions."""
    rows = []
    for uri in uris:
        size, etag = audio_files.version(uri)
        kind = {"noise": "noise", "rir": "rir"}.get(Path(uri).parent.name, "speech")
        duration_s = audio.probe(uri).duration_s
        rows.append(row(uri, kind, duration_s, size_bytes=size, etag=etag, split="train", mos=3.0, dataset="d"))
    storage.publish(table.parquet_bytes(table.from_rows(rows, "clip.v1")), f"{folder}/clips.parquet")
    return f"{folder}/clips.parquet"


def degraded(manifest: str, recipe: object, count: int) -> list[object]:
    work = samples.Degrade(manifest, recipe, 0, "flac", False, samples.libraries(recipe))  # type: ignore[arg-type]
    return work([{"id": i} for i in range(count)])


@pytest.mark.parametrize("change", ["length", "same length", "gone"])
def test_speech_that_changed_is_rejected_alone(tmp_path: Path, change: str) -> None:
    speech = corpus(tmp_path, speech=3) / "speech"
    for i in range(3):
        soundfile.write(speech / f"v{i}.wav", voice(3, seed=i), 16000)
    manifest = ingested(tmp_path, [str(speech / f"v{i}.wav") for i in range(3)])
    assert all(isinstance(result, dict) for result in degraded(manifest, as_is(), 3))
    if change == "gone":
        (speech / "v1.wav").unlink()
    else:
        soundfile.write(speech / "v1.wav", voice(3 + (change == "length"), seed=9), 16000)
    first, changed, last = degraded(manifest, as_is(), 3)
    reason = r"v1\.wav.*FileNotFoundError" if change == "gone" else r"v1\.wav': changed since it was ingested .*rerun"
    with pytest.raises(AudioError, match=reason):
        raise changed  # type: ignore[misc]
    assert isinstance(first, dict) and isinstance(last, dict)
    (other, encoded, _) = features.Load(manifest)([{"id": i} for i in range(3)])
    assert isinstance(encoded, AudioError) and isinstance(other, dict)


def test_noise_and_rooms_that_changed_reject_the_samples_that_use_them(tmp_path: Path) -> None:
    root = corpus(tmp_path, speech=2, seconds=0.5)
    manifest = ingested(tmp_path, sorted(map(str, root.glob("*/*.*"))))
    recipe = replace(weights_free(), segment_s=0.5)
    good = degraded(manifest, recipe, 10)
    assert all(any(word in row["plan"] for row in good) for word in ("white.wav", "room.wav"))  # type: ignore[index]
    for path in (root / "noise" / "white.wav", root / "rir" / "room.wav"):
        os.utime(path, (0, 0))
    for before, after in zip(good, degraded(manifest, recipe, 10), strict=True):
        uses = [kind for kind in ("noise/white.wav", "rir/room.wav") if kind in before["plan"]]  # type: ignore[index]
        assert isinstance(after, AudioError) == bool(uses), uses
    found = Clips.read(manifest)
    assert [found.noise.find(found.noise[0].clip_id), found.noise.find("0" * 16)] == [found.noise[0], None]


def test_members_of_a_tar_that_was_packed_again_are_rejected(tmp_path: Path) -> None:
    speech, file = corpus(tmp_path, speech=1) / "speech", tmp_path / "a.tar"
    with tarfile.open(file, "w") as tar:
        tar.add(speech / "v0.flac", "v0.flac")
    with file.open("rb") as data:
        (info,) = tar_files.index(data)
    manifest = ingested(tmp_path, [tar_files.Member(str(file), info.offset_data, info.size, info.name).uri])
    assert isinstance(degraded(manifest, as_is(), 1)[0], dict)
    os.utime(file, (0, 0))
    assert "changed since it was ingested" in str(degraded(manifest, as_is(), 1)[0])


def test_a_manifest_without_versions_rejects_nothing(tmp_path: Path) -> None:
    speech = corpus(tmp_path, speech=1) / "speech"
    rows = [row(str(speech / "v0.flac"), duration_s=4.0)]
    storage.publish(table.parquet_bytes(table.from_rows(rows, "clip.v1")), f"{tmp_path}/clips.parquet")
    assert isinstance(degraded(f"{tmp_path}/clips.parquet", as_is(), 1)[0], dict)
