"""The manifest that processes share: the same plans, no memory of their own, whole whoever is killed making it."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from manifests import manifest, row
from speechdistill.data import clips as clips_module
from speechdistill.data import plan
from speechdistill.data.clips import Clip, Clips, Pool, share
from speechdistill.data.degradation_recipes import as_is, voip, weights_free
from speechdistill.data.plan import Plans
from speechdistill.io import file_cache, fingerprint, storage, table
from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.io.errors import TableError

MEMORY = fsspec.filesystem("memory")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SPEECHDISTILL_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache" / "made"
    MEMORY.store.clear()


def written(rows: pa.Table, path: str) -> str:
    with fsspec.open(path, "wb") as file:
        file.write(table.parquet_bytes(rows, row_group_size=-(-len(rows) // 7)))
    return path


def shared(rows: pa.Table, folder: str) -> str:
    path = written(rows, f"{folder}/clips.parquet")
    return share(path, folder, fingerprint.of_file(path))


class Listed(list):  # type: ignore[type-arg]
    """A pool as plain rows, in manifest order."""

    def __init__(self, rows: pa.Table, kind: str) -> None:
        kept = [one for one in rows.to_pylist() if one["kind"] == kind]
        lengths = [int(one["duration_s"] * SAMPLE_RATE + 1e-6) for one in kept]
        known = zip(kept, lengths, strict=True)
        super().__init__(
            Clip(one["clip_id"], one["uri"], length, one["speaker"], one["size_bytes"], one["etag"])
            for one, length in known
        )
        self.num_samples = np.array(lengths, np.int64)


class AsRows:
    def __init__(self, rows: pa.Table) -> None:
        self.speech, self.noise, self.rir = (Listed(rows, kind) for kind in ("speech", "noise", "rir"))


@pytest.mark.parametrize("place", ["local", "memory://run"])
def test_plans_are_those_of_the_manifests_rows(place: str, tmp_path: Path) -> None:
    shuffled = np.random.default_rng(0).permutation(90)
    many, few = manifest(70, 12, 8).take(shuffled), manifest(70, 0, 0)  # kinds in any order; without recordings
    for number, rows in enumerate((many, few)):
        copy = shared(rows, f"{tmp_path if place == 'local' else place}/{number}")
        for recipe in (weights_free(), voip(), as_is()):
            expected, found = Plans(recipe, AsRows(rows), 3), Plans(recipe, Clips.read(copy), 3)  # type: ignore[arg-type]
            assert len(expected) == len(found)
            ids = range(min(len(found), 110))  # more than an epoch of those that are drawn
            assert [found[i].to_json() for i in ids] == [expected[i].to_json() for i in ids]


@pytest.mark.parametrize("length", [1, 2, 1000, 70_001])
def test_the_order_of_an_epoch_is_numpys_permutation(length: int) -> None:
    seed = np.random.SeedSequence(5, spawn_key=(0, 2))
    assert (plan._permutation(5, 2, length) == np.random.default_rng(seed).permutation(length)).all()


def test_a_speakers_clips_are_found_without_the_others(tmp_path: Path) -> None:
    speakers = np.random.default_rng(1).choice(np.array(["a", "aa", "Ä", "语", "z", None], object), 200)
    rows = [row(f"/{i}.wav", speaker=speaker) for i, speaker in enumerate(speakers)]
    pool = Clips.read(shared(table.from_rows([*rows, row("/n.wav", "noise")], "clip.v1"), str(tmp_path))).speech
    for speaker in ("a", "aa", "Ä", "语", "z", "", "b", "zz"):
        assert pool.of_speaker(speaker).tolist() == np.flatnonzero(speakers == speaker).tolist()
    assert not len(Clips(manifest(0, 2, 0)).noise.of_speaker("a"))


def test_clips_take_no_memory_of_the_process(tmp_path: Path) -> None:
    rows = 50_000
    numbers = pa.array(np.arange(rows)).cast(pa.string())
    many = {"clip_id": numbers, "uri": numbers, "kind": ["speech"] * rows, "duration_s": np.ones(rows)}
    whole = table.validate(
        pa.table({**many, "sample_rate": numbers, "channels": numbers, "speaker": numbers}), "clip.v1"
    )
    copy = shared(whole, str(tmp_path))
    before = pa.total_allocated_bytes()
    clips = Clips.read(copy)
    speech, size = clips.speech, Path(copy).stat().st_size
    assert (speech[rows - 1].uri, speech.of_speaker("77").tolist()) == (str(rows - 1), [77])
    assert not speech.num_samples.flags.owndata and not speech.of_speaker("77").flags.owndata
    assert pa.total_allocated_bytes() - before < 10_000 < size


def test_of_a_url_the_node_keeps_one_copy_and_none_where_it_may_not(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = manifest()
    copy = shared(rows, "memory://run")
    (made,) = cache.iterdir()  # of the manifest, which was sent there
    assert made.read_bytes() == MEMORY.cat_file(copy)
    assert [Clips.read(copy).speech[i].uri for i in range(50)] == rows["uri"].to_pylist()[:50]
    fetched = []
    monkeypatch.setattr(file_cache, "fetch", fetched.append)
    assert Clips.read(copy).noise[4] == Clips(rows).noise[4] and len(list(cache.iterdir())) == 2 and not fetched
    monkeypatch.setenv("SPEECHDISTILL_CACHE_GIB", "0")
    assert Clips.read(copy).rir[2] == Clips.read("memory://run/clips.parquet").rir[2] == Clips(rows).rir[2]
    assert share("memory://run/clips.parquet", "memory://other", "0" * 64) == "memory://run/clips.parquet"


def test_a_manifest_that_is_replaced_is_read_anew(tmp_path: Path, cache: Path) -> None:
    path = written(manifest(20), f"{tmp_path}/clips.parquet")
    assert len(Clips.read(path).speech) == len(Clips.read(path).speech) == 20 and len(list(cache.iterdir())) == 1
    written(manifest(21), path)
    assert len(Clips.read(path).speech) == 21
    written(manifest(21).drop_columns("speaker"), path)
    with pytest.raises(TableError, match=r"clips\.parquet.*\['speaker'\] are missing"):
        Clips.read(path)
    Path(path).unlink()
    with pytest.raises(TableError, match="no such file"):
        Clips.read(path)


def test_a_copy_that_nobody_has_opened_for_a_day_goes(tmp_path: Path, cache: Path) -> None:
    old = Clips.read(written(manifest(20), f"{tmp_path}/1.parquet"))
    (first,) = cache.iterdir()
    os.utime(first, (0, 0))
    Clips.read(written(manifest(21), f"{tmp_path}/2.parquet"))
    assert len(list(cache.iterdir())) == 1 and not first.exists()
    assert old.speech[19].uri == "/s/19.wav"  # who has mapped it keeps it


def test_a_copy_that_is_cut_is_named(tmp_path: Path) -> None:
    copy = shared(manifest(), str(tmp_path))
    with Path(copy).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(TableError, match=rf"{copy} is damaged.*delete it"):
        Clips.read(copy)


KILLED = """
import os, signal, sys
from pathlib import Path
from speechdistill.io import file_cache

def make(path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)

file_cache.make_once(Path(sys.argv[1]), make)
"""


def test_a_killed_maker_leaves_no_copy_and_the_next_one_makes_it(tmp_path: Path) -> None:
    path = tmp_path / "made"
    assert subprocess.run([sys.executable, "-c", KILLED, str(path)]).returncode == -9
    assert not path.exists()
    file_cache.make_once(path, lambda part: part.write_bytes(b"whole") and None)
    assert path.read_bytes() == b"whole" and list(tmp_path.iterdir()) == [path]


def test_a_maker_that_fails_leaves_no_copy(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        file_cache.make_once(tmp_path / "made", make)
    assert not [file for file in tmp_path.iterdir() if file.stat().st_size]


def test_where_the_disk_cannot_have_a_copy_it_is_said_and_the_manifest_is_read(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(manifest: str, path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(clips_module, "_convert", full)
    path = shared(manifest(), str(tmp_path))
    assert path == f"{tmp_path}/clips.parquet" and Clips.read(path).speech[3] == Clips(manifest()).speech[3]
    assert len(caplog.records) == 2 and all("No space left" in record.getMessage() for record in caplog.records)


def test_of_several_makers_at_once_one_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, makers = written(manifest(), f"{tmp_path}/clips.parquet"), threading.Barrier(8)
    convert, made, copies = clips_module._convert, [], []

    def counted(manifest: str, path: Path) -> None:
        made.append(path)
        convert(manifest, path)

    def one() -> None:
        makers.wait()
        copies.append(Clips.read(share(path, str(tmp_path), "0" * 64)))

    monkeypatch.setattr(clips_module, "_convert", counted)
    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1 and [len(clips.speech) for clips in copies] == [50] * 8


def test_other_files_of_a_storage_are_far_apart() -> None:
    rows = [row(f"s3://{'ab'[i % 2]}/{i}.wav", ("speech", "noise")[i % 3 == 0]) for i in range(60)]
    clips = Clips(table.from_rows([*rows, row("/local/x.wav", "rir")], "clip.v1"))
    others = clips.others("s3://a/0.wav", 3)
    assert len(set(others)) == 3 and all(other.startswith("s3://a/") for other in others)
    assert "s3://a/0.wav" not in others
    assert clips.others("/local/x.wav", 3) == [] and clips.others("/local/y.wav", 3) == ["/local/x.wav"]
    many = Clips(manifest(3000, 5, 3))
    assert len(many.others("/s/7.wav", 3)) == 3
    assert isinstance(many.noise, Pool) and many.noise.uris("/s") == []


def test_a_manifest_that_has_a_clip_twice_is_refused(tmp_path: Path) -> None:
    once, twice = str(tmp_path / "once.parquet"), str(tmp_path / "twice.parquet")
    storage.publish(table.parquet_bytes(manifest()), once)
    clips_module.check_each_once(once)
    storage.publish(table.parquet_bytes(pa.concat_tables([manifest(), manifest(speech=2, noise=0, rir=0)])), twice)
    first = min(row["clip_id"] for row in manifest(speech=2, noise=0, rir=0).to_pylist())
    with pytest.raises(TableError, match=rf"has 2 clips in a second row, {first} first; each would be labelled"):
        clips_module.check_each_once(twice)
