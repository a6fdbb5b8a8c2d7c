"""Exactly once on S3: a real moto server, behind a proxy that lets requests fail."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
import soundfile

from comparisons import without_ray
from faults.s3 import BUCKET, CREDENTIALS, KINDS, Proxy, Store, at_random
from leases import claimed_by, dead, of_another_machine
from manifests import corpus, manifest, voice
from milli import Degrade, Teach, milli_flow
from mlflow_runs import student
from speechdistill import cli
from speechdistill.commands import ingest
from speechdistill.data import manifest_parts
from speechdistill.data.clips import Clips, share
from speechdistill.data.corpora import folder
from speechdistill.data.degradation_recipes import as_is
from speechdistill.engine import cluster, flow, shards
from speechdistill.engine.isolate import CannotWork
from speechdistill.io import audio, audio_files, fingerprint, lease, storage, table
from speechdistill.io.errors import AudioError, StorageError, UnreadableError, UserError
from speechdistill.io.outputs import try_outputs
from speechdistill.io.places import Skipped
from speechdistill.labelling import samples
from speechdistill.labelling.samples import DEGRADED, TAUGHT

MILLI = Path(__file__).parents[1] / "milli.py"
HANGS_S = 600  # only bounds a hang
FIRST_SEED = int(os.environ.get("SPEECHDISTILL_FIRST_SEED", "0"))  # another one tries other faults
WHOLE = re.compile(r".*/part-(\d{8})-\d{8}\.parquet")


@pytest.fixture(scope="module")
def store() -> Iterator[Store]:
    with Store() as store:
        yield store


@pytest.fixture
def proxy(store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Proxy]:
    """This process takes the proxy for S3; `proxy.fault` says what fails, at first nothing."""
    monkeypatch.setenv("SPEECHDISTILL_CACHE", str(tmp_path / "cache"))
    with Proxy(store.url) as proxy:
        for name, value in {**proxy.environment, "AWS_RETRY_MODE": "standard", "AWS_MAX_ATTEMPTS": "10"}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        s3fs.S3FileSystem.clear_instance_cache()


# What a run has left, read directly from the store.


def parts(store: Store, out: str) -> dict[str, bytes]:
    """Every file in `shards/`."""
    return {name: store.fs.cat_file(name) for name in names(store, out)}


def names(store: Store, out: str) -> list[str]:
    return list(store.fs.ls(f"{out}/shards")) if store.fs.exists(f"{out}/shards") else []


def rows_of(data: bytes) -> pa.Table:
    return pq.read_table(BytesIO(data))


def assert_whole(name: str, data: bytes, layout: shards.Layout) -> None:
    """A whole part of the milli flow: the ids of its name, with their audio, and the hash that its footer promises."""
    match = WHOLE.fullmatch(name)
    assert match, f"{name} is no part"
    rows, ids = rows_of(data), list(layout.ids(int(match[1])))
    footer = json.loads(pq.read_metadata(BytesIO(data)).metadata[b"part"])
    assert rows["sample_id"].to_pylist() == ids and footer["part"] == int(match[1])
    assert rows["audio"].to_pylist() == [row["audio"] for row in Degrade()([{"id": i} for i in ids])]
    assert shards.content_hash(rows) == footer["content_sha256"]


def assert_complete(store: Store, layout: shards.Layout) -> None:
    """Every id in exactly one part, and `manifest.parquet` lists just the parts that are there."""
    there = parts(store, layout.out)
    for name, data in there.items():
        assert_whole(name, data, layout)
    counts = Counter(i for data in there.values() for i in rows_of(data)["sample_id"].to_pylist())
    assert counts == Counter(range(layout.num_ids))
    listed = rows_of(store.fs.cat_file(f"{layout.out}/manifest.parquet"))["path"].to_pylist()
    assert [f"{layout.out}/{path}" for path in listed] == [f"s3://{name}" for name in sorted(there)]


class Reader(threading.Thread):
    """Reads every file listed in a run's `shards/`, without faults, over and over until it is left."""

    def __init__(self, store: Store, layout: shards.Layout) -> None:
        super().__init__(daemon=True)
        self._store, self._layout, self._leave = store, layout, threading.Event()
        self.reads = 0
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            while not self._leave.wait(0.05):
                for name, data in parts(self._store, self._layout.out).items():
                    assert_whole(name, data, self._layout)
                    self.reads += 1
        except BaseException as error:
            self._error = error

    def __enter__(self) -> "Reader":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leave.set()
        self.join()
        if self._error:
            raise self._error


# Runs.


class Driver:
    """A program in a process of its own, with a Ray of its own whose workers see the proxy, too; killed when left."""

    def __init__(self, proxy: Proxy, log: Path, *command: str, **environment: str) -> None:
        self._log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                env={**os.environ, **proxy.environment, **environment},
                start_new_session=True,
                stderr=errors,
            )

    def result(self) -> tuple[int, str]:
        """Exit code and what it wrote to stderr."""
        return self.process.wait(HANGS_S), self._log.read_text()

    def __enter__(self) -> "Driver":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


def milli_driver(proxy: Proxy, log: Path, layout: shards.Layout, **environment: str) -> Driver:
    return Driver(proxy, log, str(MILLI), layout.out, str(layout.num_ids), **environment)


def run_killed_and_resumed(store: Store, layout: shards.Layout, seed: int, kill_at: int, log: Path) -> None:
    """With faults at 5%: kill the driver when `kill_at` parts are there, run again; a reader reads all the while."""
    with Proxy(store.url, at_random(seed)) as proxy, Reader(store, layout) as reader:
        with milli_driver(proxy, log, layout) as driver:
            while len(names(store, layout.out)) < kill_at:
                with suppress(subprocess.TimeoutExpired):
                    driver.process.wait(0.05)
                    break
            assert driver.process.poll() is None, f"the run ended before it could be killed\n{log.read_text()}"
        assert not store.fs.exists(f"{layout.out}/manifest.parquet")
        with milli_driver(proxy, log, layout) as driver:
            code, errors = driver.result()
            assert code == 0, errors
    assert proxy.faults.total() > 0 and reader.reads > 0
    assert_complete(store, layout)


@pytest.mark.slow  # test_flow kills a driver in `make test`
def test_a_killed_driver_resumes_with_faults_and_readers_only_see_whole_parts(store: Store, tmp_path: Path) -> None:
    layout = milli_flow(f"s3://{BUCKET}/milli", 320).layout
    run_killed_and_resumed(store, layout, seed=1, kill_at=10, log=tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(FIRST_SEED, FIRST_SEED + 10))
def test_random_faults_and_kills_lose_and_double_nothing(store: Store, tmp_path: Path, seed: int) -> None:
    layout = milli_flow(f"s3://{BUCKET}/random-{seed}", 800).layout
    run_killed_and_resumed(store, layout, seed, Random(seed).randint(1, 60), tmp_path / "log")


def test_the_main_job_makes_the_same_bits_on_s3_with_faults_as_on_a_disk(
    store: Store, tmp_path: Path, local_ray: None
) -> None:
    here, there = str(tmp_path), f"s3://{BUCKET}/main"
    corpus(tmp_path / "corpus")
    teacher = student(tmp_path / "teacher")
    store.fs.put(f"{here}/corpus", f"{there}/corpus", recursive=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flow, "run", without_ray)
        for command in commands(here, teacher):
            assert cli.main(command) == 0
    tracking = f"sqlite:///{here}/tracking.db"
    code = f"from speechdistill import cli\nfor command in {commands(there, teacher)!r}: assert cli.main(command) == 0"
    with (
        Proxy(store.url, at_random(seed=2)) as proxy,
        Driver(proxy, tmp_path / "log", "-c", code, MLFLOW_TRACKING_URI=tracking) as driver,
    ):
        exit_code, errors = driver.result()
        assert exit_code == 0, errors
    assert proxy.faults.total() > 0

    def from_store(path: str) -> bytes:
        return bytes(store.fs.cat_file(f"{there}/{path}"))

    def from_disk(path: str) -> bytes:
        return (tmp_path / path).read_bytes()

    manifests = [rows_of(read("manifest/clips.parquet")).to_pylist() for read in (from_disk, from_store)]
    moved = {mine[key]: theirs[key] for mine, theirs in zip(*manifests, strict=True) for key in ("uri", "clip_id")}
    assert all(name.replace(here, there) == moved[name] for name in moved if "/" in name)
    files = rows_of(from_store("labels/manifest.parquet"))["path"].to_pylist()
    assert [f"{BUCKET}/main/labels/{file}" for file in files] == sorted(parts(store, f"{there}/labels"))
    on_disk, on_s3 = (
        [row for file in files for row in rows_of(read(f"labels/{file}")).to_pylist()]
        for read in (from_disk, from_store)
    )
    assert [row["sample_id"] for row in on_s3] == list(range(12))
    for mine, theirs in zip(on_disk, on_s3, strict=True):
        assert theirs["audio"] == mine["audio"]
        assert theirs["plan"] == re.sub("|".join(map(re.escape, moved)), lambda match: moved[match[0]], mine["plan"])
        assert theirs["score"] == pytest.approx(mine["score"], abs=1e-5)
    assert json.loads(from_store("labels/summary.json"))["rejected"] == 0
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=tracking)
    (run,) = client.search_runs([client.get_experiment_by_name("pseudolabel").experiment_id])
    assert run.info.status == "FINISHED" and run.data.metrics["labelled"] == 12


@pytest.fixture
def recordings(store: Store, tmp_path: Path) -> str:
    """Three recordings in the bucket, and a manifest of them."""
    folder = f"s3://{BUCKET}/{tmp_path.name}"
    rows = []
    for i in range(3):
        soundfile.write(tmp_path / f"{i}.wav", voice(3.0, seed=i), 16000)
        store.fs.put(str(tmp_path / f"{i}.wav"), f"{folder}/{i}.wav")
        known = {"kind": "speech", "duration_s": 3.0, "sample_rate": 16000, "channels": 1}
        rows.append({"clip_id": f"{i:016x}", "uri": f"{folder}/{i}.wav", **known})
    store.fs.pipe_file(f"{folder}/clips.parquet", table.parquet_bytes(table.from_rows(rows, "clip.v1")))
    return folder


def test_a_file_that_cannot_be_read_is_rejected_alone_and_an_outage_rejects_none(
    store: Store, proxy: Proxy, recordings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    work = samples.Degrade(f"{recordings}/clips.parquet", as_is(), 0, "flac", False, samples.libraries(as_is()))
    rows = [{"id": i} for i in range(3)]
    assert all(isinstance(result, dict) for result in work(rows))
    for kind in ("500 InternalError", "reset"):
        proxy.fault = lambda method, path, kind=kind: kind if "1.wav" in path else None
        one, bad, two = work(rows)
        assert isinstance(bad, UnreadableError) and isinstance(one, dict) and isinstance(two, dict)
        proxy.fault = lambda method, path, kind=kind: kind
        with pytest.raises(CannotWork, match=rf"{recordings}/0\.wav.*2 other files of that storage"):
            work(rows)
    proxy.fault = lambda method, path: None
    store.check_credentials(True)  # as if they had expired
    try:
        with pytest.raises(CannotWork, match=r"0\.wav.*2 other files"):
            work(rows)
    finally:
        store.check_credentials(False)
    store.fs.rm([f"{recordings}/0.wav", f"{recordings}/1.wav", f"{recordings}/2.wav"])
    assert [type(result) for result in work(rows)] == [AudioError] * 3


def test_an_object_that_changed_since_it_was_ingested_is_rejected_without_a_request_more(
    store: Store, proxy: Proxy, recordings: str
) -> None:
    def heads() -> tuple[list[Any], int]:
        work = samples.Degrade(f"{recordings}/clips.parquet", as_is(), 0, "flac", False, samples.libraries(as_is()))
        requests: list[str] = []
        proxy.fault = lambda method, path: requests.append(path) if ".wav" in path else None
        return work([{"id": i} for i in range(3)]), len(requests)

    unversioned, before = heads()
    rows = table.read(f"{recordings}/clips.parquet", "clip.v1").to_pylist()
    versions = [dict(zip(("size_bytes", "etag"), audio_files.version(row["uri"]), strict=True)) for row in rows]
    rows = [row | version for row, version in zip(rows, versions, strict=True)]
    store.fs.pipe_file(f"{recordings}/clips.parquet", table.parquet_bytes(table.from_rows(rows, "clip.v1")))
    good, after = heads()
    assert all(isinstance(row, dict) for row in [*unversioned, *good]) and after == before
    store.fs.copy(f"{recordings}/0.wav", f"{recordings}/1.wav")  # as long as it was
    one, changed, two = heads()[0]
    assert "1.wav': changed since it was ingested" in str(changed) and isinstance(changed, AudioError)
    assert isinstance(one, dict) and isinstance(two, dict)


def test_known_objects_are_checked_by_a_listing(
    store: Store, proxy: Proxy, recordings: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"connect": lambda: None, "in_order": map}.items():
        monkeypatch.setattr(cluster, name, value)
    config = ingest.Ingest(out=f"{recordings}/manifest", speech=(recordings,))
    assert ingest.run(config).clips == {"speech": 3}
    store.fs.copy(f"{recordings}/0.wav", f"{recordings}/1.wav")  # as long as it was
    monkeypatch.setattr(manifest_parts, "_LISTED_ROWS", 3)
    asked = set()
    proxy.fault = lambda method, path: asked.add(path) if ".wav" in path else None
    assert ingest.run(config).changes == {"updated": 1, "content": 1}
    assert {path.rpartition("/")[2] for path in asked} == {"1.wav"}, "each was asked for"
    assert ingest.run(config).changes == {}


@pytest.mark.slow  # waits for all tries of each request
def test_an_outage_ends_the_run_which_then_goes_on(store: Store, recordings: str, tmp_path: Path) -> None:
    out = f"{recordings}/labels"
    command = ["pseudolabel", "--clips", f"{recordings}/clips.parquet", "--out", out, "--rows-per-part", "2"]
    code = f"import sys; from speechdistill import cli; sys.exit(cli.main({[*command, '--num-samples', '40']!r}))"
    environment = {"MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/tracking.db", "AWS_MAX_ATTEMPTS": "2"}

    requests = count()

    def outage(method: str, path: str) -> str | None:
        return "503 SlowDown" if ".wav" in path and next(requests) > 20 else None

    with Proxy(store.url, outage) as proxy, Driver(proxy, tmp_path / "log", "-c", code, **environment) as driver:
        exit_code, errors = driver.result()
        assert exit_code == 1 and re.search(r"error: the run ended early: .*\.wav.*rerun the command", errors), errors
        assert len(parts(store, out)) < 20
        proxy.fault = lambda method, path: None
        with Driver(proxy, tmp_path / "log", "-c", code, **environment) as again:
            exit_code, errors = again.result()
            assert exit_code == 0, errors
    summary = json.loads(store.fs.cat_file(f"{out}/summary.json"))
    assert (summary["labelled"], summary["rejected"]) == (40, 0)


def commands(root: str, teacher: str) -> list[list[str]]:
    folders = [word for kind in ("speech", "noise", "rir") for word in (f"--{kind}", f"{root}/corpus/{kind}")]
    ingest = ["ingest", *folders, "--out", f"{root}/manifest"]
    how = ["--num-samples", "12", "--rows-per-part", "2", "--seed", "3", "--teacher", teacher]
    return [ingest, ["pseudolabel", "--clips", f"{root}/manifest/clips.parquet", "--out", f"{root}/labels", *how]]


def test_torn_uploads_leave_whole_parts_only(store: Store, proxy: Proxy) -> None:
    layout = milli_flow(f"s3://{BUCKET}/torn", 400).layout
    shards.claim(layout.out, {})
    proxy.fault = at_random(seed=3, rate=0.3, kinds=["torn upload"])
    with Reader(store, layout) as reader, ThreadPoolExecutor(4) as threads:
        # Each part twice, as by a writer that was taken for dead.
        list(threads.map(lambda k: shards.write_parts(block(layout, k // 2), layout), range(2 * layout.num_parts)))
    assert proxy.faults["torn upload"] > 10 and reader.reads > 0
    shards.finish(layout)
    assert_complete(store, layout)


def block(layout: shards.Layout, k: int) -> pa.Table:
    """Part k as it comes to be written."""
    rows: list[dict[str, Any]] = [{"id": i} for i in layout.ids(k)]
    for worker in (Degrade(), Teach()):
        rows = [{**row, **result} for row, result in zip(rows, worker(rows), strict=True)]
    return pa.Table.from_pylist(rows, pa.schema([("id", pa.int64()), *DEGRADED, *TAUGHT, *shards.REJECT]))


def test_a_stream_that_fails_on_its_way_leaves_the_old_file(store: Store, proxy: Proxy) -> None:
    url = f"s3://{BUCKET}/stream.parquet"

    def rows() -> Iterator[pa.Table]:
        yield manifest(speech=3)
        raise ArithmeticError

    storage.publish(b"old", url)
    with pytest.raises(ArithmeticError):
        table.publish_stream(rows(), "clip.v1", url)
    assert store.fs.cat_file(url) == b"old"


@pytest.mark.slow  # waits for all tries of each request
def test_a_store_that_takes_no_upload_ends_the_run_with_its_name_and_what_to_do(store: Store, tmp_path: Path) -> None:
    layout = milli_flow(f"s3://{BUCKET}/dead", 64).layout

    def fault(method: str, path: str) -> str | None:
        return "torn upload" if method == "PUT" and "/shards/" in path else None

    with (
        Proxy(store.url, fault) as proxy,
        milli_driver(proxy, tmp_path / "log", layout, AWS_MAX_ATTEMPTS="2") as driver,
    ):
        code, errors = driver.result()
    assert code == 1
    assert re.search(r"RunError: .*s3://bucket/dead/shards/part-\d+-\d+\.parquet: .*rerun the command", errors), errors
    assert not parts(store, layout.out) and not store.fs.exists(f"{layout.out}/manifest.parquet")


# Leases.


def test_of_claimants_at_once_on_s3_exactly_one_holds(store: Store, proxy: Proxy) -> None:
    urls = [f"s3://{BUCKET}/claims-{i}" for i in range(4)]
    for url in urls[::2]:
        store.fs.pipe_file(f"{url}/.lease-000001", dead())
    assert claimed_by(2, urls) == [1] * len(urls)
    assert not [url for url in urls if store.fs.exists(url)], "a lease is left"


def test_on_s3_a_renewed_lease_is_respected_and_another_is_taken_over(
    store: Store, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_BEAT_S", 0.2)
    monkeypatch.setattr(lease, "_DEAD_S", 2.0)
    url = f"s3://{BUCKET}/lease"
    store.fs.pipe_file(f"{url}/.lease-000001", of_another_machine())
    with lease.held(url, "prune"):
        monkeypatch.setattr(lease, "machine", lambda: "elsewhere")
        with pytest.raises(lease.LeaseError, match="`speechdistill prune`"), lease.held(url, "ingest"):
            pass
    assert not store.fs.exists(url)


# One operation at a time, in this process.


def read_footer(url: str) -> bool:
    return shards.survey(milli_flow(url, 8).layout)[1].labelled == 8


def delete_summary(url: str) -> bool:
    return shards.reopen(milli_flow(url, 8).layout) is None


def list_folder(url: str) -> bool:
    return [row["uri"] for row in folder.rows(url, "speech", Skipped())] == [f"{url}/voice.wav"]


def load_audio(url: str) -> bool:
    return np.array_equal(audio.quantise(audio.load(f"{url}/voice.wav", 16000, 8000)), WAVE[16000:24000])


def share_clips(url: str) -> bool:
    copy = share(f"{url}/clips.parquet", url, "0" * 64)
    return copy.endswith(".arrow") and Clips.read(copy).speech[49] == Clips(manifest()).speech[49]


def hold(url: str) -> bool:
    with lease.held(url, "ingest") as held:
        held._renew()
        return not held.lost.is_set()


WAVE = audio.quantise(voice(2.0))
OPERATIONS: dict[str, Callable[[str], bool]] = {
    "publish": lambda url: storage.publish(b"new", f"{url}/new") is None,
    "read-json": lambda url: storage.read_json(f"{url}/run.json") == {"a": 1},
    "read-json-that-is-missing": lambda url: storage.read_json(f"{url}/none.json") is None,
    "hash": lambda url: fingerprint.of_file(f"{url}/run.json") == hashlib.sha256(b'{"a": 1}').hexdigest(),
    "list-shards": lambda url: shards.listed(url) == {0: 8},
    "read-footer": read_footer,
    "delete-summary": delete_summary,
    "list-folder": list_folder,
    "load-audio": load_audio,
    "share-clips": share_clips,
    "hold-lease": hold,
    "try-output": lambda url: try_outputs(f"{url}/labels/x.csv", f"{url}/run.json") is None,
}


def test_an_output_in_a_bucket_that_is_not_there_is_refused(store: Store, proxy: Proxy) -> None:
    with pytest.raises(StorageError, match=r"s3://nowhere/x\.csv: .*bucket does not exist"):
        try_outputs("s3://nowhere/x.csv")
    try_outputs(f"s3://{BUCKET}/tried/x.csv")
    assert store.fs.find(f"{BUCKET}/tried") == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A small run's files, and one recording."""
    root = tmp_path_factory.mktemp("files")
    layout = milli_flow(root, 8).layout
    shards.claim(layout.out, {})
    shards.write_parts(block(layout, 0), layout)
    soundfile.write(root / "voice.wav", WAVE, audio.SAMPLE_RATE)
    names = ["shards/part-00000000-00000008.parquet", "voice.wav"]
    known = {"run.json": b'{"a": 1}', "summary.json": b"{}", "clips.parquet": table.parquet_bytes(manifest())}
    return known | {name: (root / name).read_bytes() for name in names}


def url_of(store: Store, files: dict[str, bytes], name: str) -> str:
    store.fs.pipe({f"{BUCKET}/{name}/{file}": data for file, data in files.items()})
    return f"s3://{BUCKET}/{name}"


def test_every_operation_survives_every_fault_in_each_of_its_requests(
    store: Store, proxy: Proxy, files: dict[str, bytes]
) -> None:
    cases = {f"once-{i}-{name}": (kind, name) for i, kind in enumerate(KINDS) for name in OPERATIONS}
    urls = {case: url_of(store, files, case) for case in cases}
    asked = Counter[tuple[str, str]]()

    def fault(method: str, path: str) -> str | None:
        case = re.search(r"once-\d-[a-z-]+", path)
        asked[method, path] += 1
        kind = cases[case[0]][0] if case else ""
        return kind if asked[method, path] == 1 and method in KINDS.get(kind, "").split() else None

    proxy.fault = fault
    with ThreadPoolExecutor(16) as threads:
        right = threads.map(lambda case: OPERATIONS[cases[case][1]](urls[case]), cases)
        assert dict(zip(cases, right, strict=True)) == dict.fromkeys(cases, True)
    assert set(proxy.faults) == set(KINDS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_store_that_is_away_is_named_and_not_taken_for_an_empty_one(
    store: Store, proxy: Proxy, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    url = url_of(store, files, f"away-{name}")
    for kind in ("500 InternalError", "reset"):  # errors of two families
        proxy.fault = lambda method, path, kind=kind: kind
        with pytest.raises(UserError, match=url):  # which the command line reports in one line
            OPERATIONS[name](url)


@pytest.mark.parametrize("command", [["pseudolabel", "--clips"], ["ingest", "--list"]], ids=["pseudolabel", "ingest"])
def test_a_driver_tries_its_first_request_as_often_as_its_workers(
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracking.db")
    for name in ("AWS_RETRY_MODE", "AWS_MAX_ATTEMPTS"):
        monkeypatch.delenv(name)
    assert cli.main([*command, f"s3://{BUCKET}/none.parquet", "--out", f"s3://{BUCKET}/none"]) == 1
    assert f"s3://{BUCKET}/none.parquet" in capsys.readouterr().err
    client = s3fs.S3FileSystem.current().s3
    assert client.meta.config.retries == {"mode": "standard", "total_max_attempts": 10}


@pytest.mark.parametrize("keys", ["wrong", "none"])
def test_credentials_that_do_not_fit_are_told_before_the_work(
    store: Store,
    proxy: Proxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    keys: str,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracking.db")
    monkeypatch.setattr(flow, "run", lambda job: pytest.fail("work has begun"))
    if keys == "none":
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.setenv(name, os.devnull)
        for name in CREDENTIALS:
            monkeypatch.delenv(name)
    store.check_credentials(True)
    try:
        code = cli.main(["pseudolabel", "--clips", f"s3://{BUCKET}/clips.parquet", "--out", f"s3://{BUCKET}/labels"])
    finally:
        store.check_credentials(False)
    assert code == 1
    assert re.search(r"error: s3://bucket/labels/[\w.]+: .*check .* the credentials", capsys.readouterr().err)


def test_a_missing_bucket_and_a_missing_tracking_server_are_told_before_the_work(
    store: Store,
    proxy: Proxy,
    files: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(flow, "run", lambda job: pytest.fail("work has begun"))
    clips = f"s3://{BUCKET}/clips.parquet"
    storage.publish(table.parquet_bytes(manifest(speech=3)), clips)
    job = ["pseudolabel", "--clips", clips, "--num-samples", "2", "--out"]
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert cli.main([*job, f"s3://{BUCKET}/untracked"]) == 1
    assert "s3://bucket/untracked" in (error := capsys.readouterr().err) and "MLFLOW_TRACKING_URI" in error
    assert not store.fs.exists(f"{BUCKET}/untracked")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/tracking.db")
    assert cli.main([*job, "s3://no-such-bucket/labels"]) == 1
    assert re.search(r"error: s3://no-such-bucket/labels.*bucket does not exist", capsys.readouterr().err)
