"""The cache of remote files: right bytes, few requests, a bound, many processes, errors of the file itself."""

import hashlib
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import fsspec
import numpy as np
import pytest
import s3fs
import soundfile
from fsspec.implementations.memory import MemoryFileSystem

from faults.s3 import BUCKET, Proxy, Store
from manifests import voice
from speechdistill.data.degradation import Step
from speechdistill.data.degradations import noise, rooms
from speechdistill.io import audio, file_cache, tar_files
from speechdistill.io.errors import AudioError, UnreadableError

MEMORY = fsspec.filesystem("memory")
SMALL_GIB = 16 * 16 * 1000 / 2**30  # files of 1000 bytes, 16 in each of 16 folders


def wav(wave: np.ndarray) -> bytes:
    buffer = BytesIO()
    soundfile.write(buffer, wave, 16000, format="WAV")
    return buffer.getvalue()


def samples(path: str) -> np.ndarray:
    return audio.load(path, 100, 4000)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache of a test, which is under `tmp_path` even where its place is not given."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("SPEECHDISTILL_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    MEMORY.store.clear()


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file of `memory://` has been opened."""
    counts, original = Counter[str](), MemoryFileSystem._open

    def counted(self: MemoryFileSystem, path: str, mode: str = "rb", *args: object, **options: object) -> object:
        counts[path] += mode == "rb"
        return original(self, path, mode, *args, **options)

    monkeypatch.setattr(MemoryFileSystem, "_open", counted)
    return counts


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_file_is_fetched_once_and_keeps_its_suffix(folder: Path, opened: Counter[str]) -> None:
    wave = voice(1.0)
    MEMORY.pipe_file("/noise/a.wav", wav(wave))
    paths = []
    for _ in range(3):
        part = file_cache.read("memory://noise/a.wav", lambda path: paths.append(path) or samples(path))
        np.testing.assert_array_equal(part, samples("memory://noise/a.wav"))
    assert opened["/noise/a.wav"] == 1 + 3  # by the three direct reads
    (copy,) = files(folder)
    assert set(paths) == {str(copy)} and copy.suffix == ".wav" and copy.stat().st_mode & 0o077 == 0


def test_local_and_chained_paths_are_read_as_they_are(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(wav(voice(0.5)))
    chained = "zip://a.wav::memory://noise.zip"
    for uri in (str(tmp_path / "a.wav"), f"file://{tmp_path}/a.wav", f"local://{tmp_path}/a.wav", chained):
        assert file_cache.read(uri, str) == uri
    assert not folder.exists()


def test_a_changed_file_is_fetched_again(opened: Counter[str]) -> None:
    for contents_now in (b"one", b"two", b"longer"):  # of the same size, too
        MEMORY.pipe_file("/a.raw", contents_now)
        for _ in range(2):
            assert file_cache.read("memory://a.raw", lambda path: Path(path).read_bytes()) == contents_now
    assert opened["/a.raw"] == 3


def test_a_storage_that_does_not_tell_of_changes_is_not_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    MEMORY.pipe_file("/a.raw", b"bytes")
    monkeypatch.setattr(MemoryFileSystem, "info", lambda self, path: {"name": path, "size": 5, "type": "file"})
    assert file_cache.read("memory://a.raw", str) == "memory://a.raw"


@pytest.mark.parametrize(("gib", "size"), [("0", 1), (f"{SMALL_GIB}", 1001), ("4", (1 << 24) + 1)])
def test_large_files_stay_where_they_are(
    folder: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch, gib: str, size: int
) -> None:
    monkeypatch.setenv("SPEECHDISTILL_CACHE_GIB", gib)
    MEMORY.pipe_file("/a.raw", bytes(size))
    assert file_cache.read("memory://a.raw", str) == "memory://a.raw"
    assert not opened.total() and not folder.exists()


def test_the_bound_is_held_and_the_least_recently_used_go(
    folder: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPEECHDISTILL_CACHE_GIB", f"{SMALL_GIB}")
    (folder / "0").mkdir(parents=True)
    for name in ("torn", "torn too"):  # by processes that were killed
        (folder / "0" / name).write_bytes(bytes(1500))
        os.utime(folder / "0" / name, ns=(0, 0))
    names = [f"{i}.raw" for i in range(1500)]
    for i, name in enumerate(names):
        MEMORY.pipe_file(f"/{name}", i.to_bytes(2, "big") * 500)
        for used in (name, "0.raw"):
            found = file_cache.read(f"memory://{used}", lambda path: Path(path).read_bytes())
            assert found == MEMORY.cat_file(f"/{used}")
        if i % 100 == 0:
            assert sum(path.stat().st_size for path in files(folder)) <= SMALL_GIB * 2**30
    assert opened["/0.raw"] == 1
    held = {path.read_bytes()[:2] for path in files(folder)}
    assert len(held) == 256 and bytes(2) in held and not list(folder.rglob("torn*"))
    assert np.median([int.from_bytes(i, "big") for i in held]) > 1300


def test_a_damaged_copy_is_replaced(folder: Path) -> None:
    wave = voice(1.0)
    MEMORY.pipe_file("/a.wav", wav(wave))
    expected = samples("memory://a.wav")
    damages = (lambda copy: copy.write_bytes(b"torn"), lambda copy: copy.write_bytes(bytes(copy.stat().st_size)))
    for damage in damages:
        file_cache.read("memory://a.wav", samples)
        damage(files(folder)[0])
        for _ in range(2):
            np.testing.assert_array_equal(file_cache.read("memory://a.wav", samples), expected)
        assert files(folder)[0].read_bytes() == wav(wave)


def test_a_copy_may_go_at_any_time(folder: Path) -> None:
    MEMORY.pipe_file("/a.wav", wav(voice(1.0)))
    expected = samples("memory://a.wav")

    def evicted_before(path: str) -> np.ndarray:
        Path(path).unlink(missing_ok=True)
        return samples(path)

    def evicted_while_open(path: str) -> np.ndarray:
        with audio.opened(path) as reader:
            Path(path).unlink(missing_ok=True)
            return np.concatenate(list(reader.blocks(0, 16000)))[100:4100, 0]

    for reader in (evicted_before, evicted_while_open):
        np.testing.assert_array_equal(file_cache.read("memory://a.wav", reader), expected)
        assert not files(folder)


def test_a_disk_that_takes_no_files_fails_no_sample(
    folder: Path, tmp_path: Path, opened: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    MEMORY.pipe_file("/a.wav", wav(voice(1.0)))
    expected = samples("memory://a.wav")
    opened.clear()

    def same(times: int) -> None:
        np.testing.assert_array_equal(file_cache.read("memory://a.wav", samples), expected)
        assert opened["/a.wav"] == times
        assert not folder.is_dir() or not files(folder)

    folder.write_text("a file")
    same(1)
    folder.unlink()
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10}))
        same(2)
    with monkeypatch.context() as patch:  # what is full although it said otherwise
        full, fdopen = os.open("/dev/full", os.O_WRONLY), os.fdopen
        patch.setattr("os.fdopen", lambda handle, mode: os.close(handle) or fdopen(full, mode))
        same(4)


def test_a_folder_of_another_user_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPEECHDISTILL_CACHE")
    MEMORY.pipe_file("/a.raw", b"bytes")
    path = file_cache.read("memory://a.raw", str)
    folder = tmp_path / f"speechdistill-cache-{os.getuid()}"
    assert Path(path).is_relative_to(folder) and folder.stat().st_mode & 0o077 == 0
    monkeypatch.setattr("os.getuid", lambda: 12345)
    (tmp_path / "speechdistill-cache-12345").mkdir()
    assert file_cache.read("memory://a.raw", str) == "memory://a.raw"


def steps(uri: str) -> list[Step]:
    return [noise.RecordedNoise("n", uri, 0, 8000, 0, 10.0), rooms.MeasuredRoom("r", uri)]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "FileNotFoundError"),
        (b"", "empty"),
        (b"no audio" * 99, "not audio"),
        (wav(voice(1.0))[:999], "truncated"),
    ],
    ids=["missing", "empty", "no-audio", "truncated"],
)
def test_errors_are_those_of_the_file_itself(data: bytes | None, reason: str) -> None:
    uri = "memory://folder/a.wav"
    if data is not None:
        MEMORY.pipe_file("/folder/a.wav", data)
    with pytest.raises(AudioError, match=reason) as direct:
        audio.load(uri)
    for step in steps(uri):
        with pytest.raises(AudioError) as through:
            step.apply(voice(0.5))
        assert (type(through.value), str(through.value)) == (type(direct.value), str(direct.value))


def test_a_section_that_a_changed_file_lacks_is_told_with_its_uri() -> None:
    MEMORY.pipe_file("/a.wav", wav(voice(0.2)))
    with pytest.raises(AudioError, match=r"'memory://a\.wav': samples 0\.\.8000 lie outside its 3200"):
        steps("memory://a.wav")[0].apply(voice(0.5))


# S3


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with Store() as store:
        yield store


@pytest.fixture
def asked() -> Counter[str]:
    """How often each method was asked for an audio file."""
    return Counter()


@pytest.fixture
def proxy(store: Store, asked: Counter[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    def count(method: str, path: str) -> None:
        asked[method] += ".wav" in path or ".tar" in path

    with Proxy(store.url, count) as proxy:
        for name, value in {**proxy.environment, "AWS_MAX_ATTEMPTS": "1"}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


def test_on_s3_a_sample_asks_once_whether_its_noise_has_changed(
    store: Store, proxy: Proxy, asked: Counter[str]
) -> None:
    wave = voice(2.0)
    store.fs.pipe_file(f"{BUCKET}/a.wav", wav(wave))
    (step, room), speech = steps(f"s3://{BUCKET}/a.wav"), voice(0.5)
    first = step.apply(speech)
    fetching = dict(asked)
    asked.clear()
    np.testing.assert_array_equal(step.apply(speech), first)
    assert fetching["GET"] == 1 and dict(asked) == {"HEAD": 1}
    room.apply(speech)
    assert dict(asked) == {"HEAD": 2}
    store.fs.pipe_file(f"{BUCKET}/a.wav", wav(np.roll(wave, 16000)))
    assert (step.apply(speech) != first).any()


def test_a_member_of_a_tar_is_fetched_alone(store: Store, proxy: Proxy, asked: Counter[str]) -> None:
    data, archive = wav(voice(1.0)), BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in ("a.wav", "b.wav"):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))
    store.fs.pipe_file(f"{BUCKET}/noise.tar", archive.getvalue())
    (_, second) = tar_files.index(archive)
    uri = tar_files.Member(f"s3://{BUCKET}/noise.tar", second.offset_data, second.size, second.name).uri
    expected = samples(uri)
    for _ in range(2):
        asked.clear()
        np.testing.assert_array_equal(file_cache.read(uri, samples), expected)
    assert dict(asked) == {"HEAD": 1}


def test_an_outage_is_an_unreadable_file_of_its_uri(store: Store, proxy: Proxy) -> None:
    uri = f"s3://{BUCKET}/away.wav"
    store.fs.pipe_file(f"{BUCKET}/away.wav", wav(voice(1.0)))
    for kind in ("500 InternalError", "reset"):
        proxy.fault = lambda method, path, kind=kind: kind
        with pytest.raises(UnreadableError, match=uri):
            steps(uri)[0].apply(voice(0.5))
    proxy.fault = lambda method, path: None
    steps(uri)[0].apply(voice(0.5))


WORKER = """
import hashlib, json, random, sys
from speechdistill.io import audio, file_cache
uris = json.loads(sys.argv[1])
for _ in range(3):
    random.shuffle(uris)
    for uri in uris:
        found = file_cache.read(uri, lambda path: audio.quantise(audio.load(path)))
        print(json.dumps([uri, hashlib.sha256(found).hexdigest()]))
"""


@pytest.mark.parametrize("evicted", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["left alone", "evicted"])
@pytest.mark.server
def test_processes_share_the_files(
    store: Store, proxy: Proxy, asked: Counter[str], folder: Path, evicted: bool
) -> None:
    waves = {f"s3://{BUCKET}/shared-{i}.wav": audio.quantise(voice(0.5, seed=i)) for i in range(20)}
    for uri, wave in waves.items():
        store.fs.pipe_file(uri, wav(wave))
    command = [sys.executable, "-c", WORKER, json.dumps(list(waves))]
    paths = {"PYTHONPATH": str(Path(file_cache.__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    workers = [subprocess.Popen(command, env={**os.environ, **paths}, stdout=subprocess.PIPE) for _ in range(2)]
    while evicted and any(worker.poll() is None for worker in workers):
        for path in files(folder):
            path.unlink(missing_ok=True)
        with suppress(subprocess.TimeoutExpired):
            workers[0].wait(0.01)
    printed = [worker.communicate()[0].splitlines() for worker in workers]
    assert not any(worker.returncode for worker in workers)
    assert [len(lines) for lines in printed] == [3 * 20] * 2
    assert {tuple(json.loads(line)) for lines in printed for line in lines} == {
        (uri, hashlib.sha256(wave).hexdigest()) for uri, wave in waves.items()
    }
    if evicted:
        assert asked["GET"] > 2 * 20
    else:
        assert len(files(folder)) == 20 <= asked["GET"] <= 2 * 20  # of 120 reads; some fetch at the same time
