"""Tracking through outages, kills and resumes: a real sqlite store, and a real MLflow server that is stopped."""

import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fsspec
import pytest

from mlflow_runs import Gateway, tracking_server
from speechdistill.io import storage
from speechdistill.tracking import mlflow_client, mlflow_sender
from speechdistill.tracking import run as tracking_run
from speechdistill.tracking.run import Synced, Tracking, TrackingError, run_id, sync

NOBODY = "http://127.0.0.1:9"  # the discard port: nobody listens


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gateway]:
    with tracking_server(tmp_path_factory.mktemp("server")) as url:
        gateway = Gateway(url)
        yield gateway
        gateway.stop()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(tracking_run, "_SEND_S", 0.1)
    monkeypatch.setattr(tracking_run, "_SEND_AT_MOST_S", 0.5)
    monkeypatch.setattr(tracking_run, "_WRITE_S", 0.01)


@pytest.fixture
def experiment() -> str:
    return f"test {uuid.uuid4().hex}"


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "it never came"
        threading.Event().wait(0.05)
    return value


def client(uri: str) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def runs_of(uri: str, experiment: str) -> list[Any]:
    found = client(uri).get_experiment_by_name(experiment)
    return list(client(uri).search_runs([found.experiment_id])) if found else []


def points_at(uri: str, run_id: str, *keys: str) -> list[tuple[str, int, int, float]]:
    """(key, time, step, value) of every point, doubles included."""
    histories = (client(uri).get_metric_history(run_id, key) for key in keys)
    return sorted((m.key, m.timestamp, m.step, m.value) for history in histories for m in history)


def events_of(out: str) -> list[dict[str, Any]]:
    fs, path = fsspec.url_to_fs(f"{out}/tracking")
    names = sorted(fs.glob(f"{path}/events-*.jsonl"))
    return [json.loads(line) for name in names for line in fs.cat_file(name).splitlines()]


def points_of(out: str) -> list[tuple[str, int, int, float]]:
    metrics = (event for event in events_of(out) if event["event"] == "metrics")
    return sorted((key, e["time_ms"], e["step"], float(v)) for e in metrics for key, v in e["values"].items())


def unsent(out: Path, monkeypatch: pytest.MonkeyPatch, experiment: str, points: int = 3) -> None:
    """A run that ended while its server did not answer."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", NOBODY)
    run = Tracking(str(out), experiment, "name", {"seed": 1})
    for step in range(points):
        run.metrics({"loss": 1 / (step + 1)}, step)
    run.document({"labelled": 4}, "summary.json")
    run.end("FINISHED")
    assert run_id(str(out)) is None


def test_an_outage_loses_and_doubles_nothing(
    server: Gateway, tmp_path: Path, experiment: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    ended, open_ = str(tmp_path / "ended"), str(tmp_path / "open")
    runs = {out: Tracking(out, experiment, Path(out).name, {"seed": 1}) for out in (ended, open_)}
    for run in runs.values():
        run.metrics({"loss": 9.0, "rate": 0.1}, 0)
    until(lambda: all(run_id(out) for out in runs))

    server.stop()
    for step in range(1, 600):  # three segments
        for run in runs.values():
            run.metrics({"loss": 1 / step, "rate": 0.1}, step)
    runs[ended].document({"labelled": 4}, "tables/summary.json")
    runs[ended].end("FINISHED")
    assert any("the run continues" in message and server.uri in message for message in caplog.messages)
    (left,) = [message for message in caplog.messages if f"speechdistill sync {ended}" in message]
    assert int(re.match(r"\d+", left)[0]) >= 601, "599 points, a file, and how it ended"
    with pytest.raises(TrackingError, match=f"{server.uri}.*rerun `speechdistill sync` once MLflow answers"):
        sync(ended)

    server.start()
    ids = {out: run_id(out) for out in runs}
    until(lambda: len(points_at(server.uri, ids[open_], "loss")) == 600)  # by itself
    runs[open_].end("FAILED")
    synced = sync(ended)
    assert (synced.left, synced.run_id) == (0, ids[ended]) and synced.sent >= 601
    assert (sync(ended).sent, sync(open_).sent) == (0, 0)
    assert sum("the run continues" in message for message in caplog.messages) == 2, "once for each run"
    for out, status in ((ended, "FINISHED"), (open_, "FAILED")):
        assert points_at(server.uri, ids[out], "loss", "rate") == points_of(out)
        assert len(points_of(out)) == 1200
        assert client(server.uri).get_run(ids[out]).info.status == status
    assert [file.path for file in client(server.uri).list_artifacts(ids[ended], "tables")] == ["tables/summary.json"]
    assert {run.info.run_id for run in runs_of(server.uri, experiment)} == set(ids.values())


def test_a_server_that_never_answers_holds_nothing_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "86400")  # whoever waits for the answer fails this test
    with socket.create_server(("127.0.0.1", 0)) as mute:
        mute.settimeout(120)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mute.getsockname()[1]}")
        run = Tracking(str(tmp_path), "experiment", "name", {})
        connection, _ = mute.accept()
        with connection:
            assert connection.recv(1)  # from now on, the sender waits
            run.metrics({"loss": 1.0}, 0)
            run.document({}, "summary.json")
            run.end("FINISHED", patience_s=0.5)
    assert [event["event"] for event in events_of(str(tmp_path))] == ["run", "metrics", "artifact", "status"]
    assert any(message.startswith("4 events are not sent") for message in caplog.messages)


def test_storage_that_fails_for_a_while_loses_nothing(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    (tmp_path / "tracking").write_text("in the way of the folder")
    run = Tracking(str(tmp_path), experiment, "name", {})
    run.metrics({"loss": 1.0}, 0)
    run.document({}, "summary.json")
    until(lambda: any("kept in memory" in message for message in caplog.messages))
    (tmp_path / "tracking").unlink()
    run.metrics({"loss": 0.5}, 1)
    run.end("FINISHED")
    assert sum("kept in memory" in message for message in caplog.messages) == 1
    (there,) = runs_of(database, experiment)
    points = points_at(database, there.info.run_id, "loss")
    assert points == points_of(str(tmp_path)) and [step for _, _, step, _ in points] == [0, 1]
    assert [file.path for file in client(database).list_artifacts(there.info.run_id)] == ["summary.json"]


def test_storage_that_never_comes_back_does_not_hold_up_the_end(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    (tmp_path / "tracking").write_text("in the way of the folder")
    run = Tracking(str(tmp_path), "experiment", "name", {})
    run.end("FINISHED", patience_s=0.5)
    assert any(message.startswith("2 events could not be written") for message in caplog.messages)


def test_a_driver_killed_right_after_it_created_its_run_makes_no_second_one(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    code = (
        "import os, signal, sys; from speechdistill.tracking import mlflow_sender;"
        "from speechdistill.tracking.run import Tracking;"
        "mlflow_sender.Sender._store = lambda self: os.kill(os.getpid(), signal.SIGKILL);"
        "Tracking(sys.argv[1], sys.argv[2], 'name', {}).end('FINISHED', 300)"
    )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    environment = {**os.environ, "PYTHONPATH": str(Path(tracking_run.__file__).parents[2])}
    driver = subprocess.run([sys.executable, "-c", code, str(tmp_path), experiment], env=environment)
    assert driver.returncode == -signal.SIGKILL and run_id(str(tmp_path)) is None
    (orphan,) = runs_of(database, experiment)
    run = Tracking(str(tmp_path), experiment, "name", {})
    run.metrics({"loss": 1.0}, 0)
    run.end("FINISHED")
    (there,) = runs_of(database, experiment)
    assert there.info.run_id == orphan.info.run_id == run_id(str(tmp_path))
    assert there.data.metrics == {"loss": 1.0}


def test_two_syncs_at_once_double_nothing(
    server: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    unsent(tmp_path, monkeypatch, experiment, points=300)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    together, nobody_found, create_one = threading.Barrier(4), threading.Barrier(4), threading.Lock()
    find, create = mlflow_sender.Sender._find, mlflow_sender.Sender._create

    def find_together(self: Any, first: Any) -> Any:
        found = find(self, first)
        if found is None:
            with suppress(threading.BrokenBarrierError):  # it breaks where one finds nothing while the others wait
                nobody_found.wait(1)
        return found

    def create_in_turn(self: Any, first: Any) -> Any:
        with create_one:  # the worst case: each looked before the first had created, and creates after it looked again
            return create(self, first)

    def synced(_: int) -> Synced:
        together.wait()
        return sync(str(tmp_path))

    monkeypatch.setattr(mlflow_sender.Sender, "_find", find_together)
    monkeypatch.setattr(mlflow_sender.Sender, "_create", create_in_turn)

    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(synced, range(4)))
    (there,) = runs_of(server.uri, experiment)
    assert {(result.run_id, result.left) for result in results} == {(there.info.run_id, 0)}
    assert points_at(server.uri, there.info.run_id, "loss") == points_of(str(tmp_path))
    assert there.info.status == "FINISHED" and there.info.start_time == events_of(str(tmp_path))[0]["time_ms"]


def test_what_is_sent_again_stays_once(
    server: Gateway, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    run = Tracking(str(tmp_path), experiment, "name", {"seed": 1})
    odd = {"nan": math.nan, "inf": math.inf, "third": 1 / 3}
    for step in (0, 1):
        run.metrics(odd, step)
    run.end("FINISHED")
    (tmp_path / "tracking" / "sent.json").unlink()
    assert sync(str(tmp_path)).sent == 4
    (there,) = runs_of(server.uri, experiment)
    points = points_at(server.uri, there.info.run_id, "third", "nan", "inf")
    assert len(points) == 6 and len({(key, step) for key, _, step, _ in points}) == 6
    assert [value for key, _, _, value in points if key == "third"] == [1 / 3, 1 / 3]
    assert all(math.isnan(value) for key, _, _, value in points if key == "nan")


def test_a_resumed_run_goes_on_as_the_same_one(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    statuses = []
    for session, samples in enumerate((2, 4, 4, 2)):
        run = Tracking(str(tmp_path), experiment, "name", {"samples": samples, "seed": 1, f"new {session}": None})
        assert run.last_step() == session - 1
        run.metrics({"loss": 1.0}, session)
        until(lambda: [r.info.status for r in runs_of(database, experiment)] == ["RUNNING"])
        run.end("KILLED" if session < 3 else "FINISHED")
        (there,) = runs_of(database, experiment)
        statuses.append((there.info.status, there.data.params["samples"], there.data.tags.get("changed.samples")))
    assert statuses == [("KILLED", "2", None), ("KILLED", "2", "4"), ("KILLED", "2", "4"), ("FINISHED", "2", "2")]
    assert set(there.data.params) == {"samples", "seed", "new 0", "new 1", "new 2", "new 3"}
    assert "changed.seed" not in there.data.tags
    assert points_at(database, there.info.run_id, "loss") == points_of(str(tmp_path))
    assert len({(e["time_ms"], e["step"]) for e in events_of(str(tmp_path)) if e["event"] == "metrics"}) == 4


def test_an_output_on_an_object_store_is_tracked_through_the_server(
    server: Gateway, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    from matplotlib.figure import Figure

    out = f"memory://{uuid.uuid4().hex}/run"
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI"):
        Tracking(out, experiment, "name", {})
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    for step in (0, 1):
        run = Tracking(out, experiment, "name", {"seed": 1})
        run.metrics({"loss": 1.0}, step)
        run.figure(Figure(), "scores.png")
        run.end("FINISHED")
    (there,) = runs_of(server.uri, experiment)
    assert there.info.run_id == run_id(out) and there.info.status == "FINISHED"
    assert points_at(server.uri, there.info.run_id, "loss") == points_of(out) and len(points_of(out)) == 2
    picture = Path(client(server.uri).download_artifacts(there.info.run_id, "scores.png")).read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert sync(out) == Synced(0, 0, there.info.run_id)


def test_no_password_is_written_or_told(
    server: Gateway,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    experiment: str,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("DEBUG", logger="speechdistill")
    for host, folder in ((server.uri.removeprefix("http://"), "there"), (NOBODY.removeprefix("http://"), "gone")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://someone:s3cret@{host}")
        run = Tracking(str(tmp_path / folder), experiment, "name", {"seed": 1})
        run.metrics({"loss": 1.0}, 0)
        run.document({}, "summary.json")
        run.end("FINISHED")
    with pytest.raises(TrackingError, match=NOBODY) as refused:
        sync(str(tmp_path / "gone"))
    assert len(runs_of(server.uri, experiment)) == 1, "the password was not used"
    told = [str(refused.value), str(refused.getrepr(style="native")), caplog.text, *capfd.readouterr()]
    written = [file.read_text() for file in tmp_path.rglob("*") if file.is_file()]
    assert any("the run continues" in text for text in told) and any(server.uri in text for text in written)
    assert not [text for text in told + written if "s3cret" in text]
    assert mlflow_client.without_password("postgresql://me:a/b:c@db/x and http://h:80/y") == (
        "postgresql://db/x and http://h:80/y"
    )


def test_a_run_goes_to_another_server_as_a_whole_and_only_where_one_is_named(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, experiment: str
) -> None:
    with pytest.raises(TrackingError, match="has no tracking log"):
        sync(str(tmp_path / "empty"))
    unsent(tmp_path / "run", monkeypatch, experiment)
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(TrackingError, match=f"was tracked at {NOBODY}; set MLFLOW_TRACKING_URI"):
        sync(str(tmp_path / "run"))
    assert not (tmp_path / "run" / "mlflow.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert sync(str(tmp_path / "run")).sent == 6
    (there,) = runs_of(database, experiment)
    assert points_at(database, there.info.run_id, "loss") == points_of(str(tmp_path / "run"))
    client(database).delete_run(there.info.run_id)
    assert sync(str(tmp_path / "run")).sent == 6, "a run that is gone is made anew"
    (anew,) = runs_of(database, experiment)
    assert anew.info.run_id != there.info.run_id and anew.data.metrics == there.data.metrics


def test_one_bad_entry_does_not_hold_up_the_rest(
    tmp_path: Path, database: str, monkeypatch: pytest.MonkeyPatch, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    run = Tracking(str(tmp_path), experiment, "name", {"not allowed!": 1, "seed": 1, "long": "x" * 9000})
    run.metrics({"none": None, "text": "much", "not allowed!": 1.0, "good": 1.0}, 0)
    run.metrics({"good": 2.0, "not allowed!": 2.0}, 1)
    run.figure(None, "no figure.png")
    until(lambda: runs_of(database, experiment))
    monkeypatch.setattr("mlflow.MlflowClient.log_artifact", lambda *_: 1 / 0)
    run.document({"x": 1}, "later.json")
    run.metrics({"good": 3.0}, 2)
    run.end("FINISHED")
    told = "\n".join(caplog.messages)
    for name in ("metric none", "metric text", "no figure.png"):
        assert f"{name} is not tracked" in told
    assert told.count("'not allowed!' of the metrics is refused") == 1
    assert told.count("'not allowed!' of the params is refused") == 1
    assert "artifact later.json is not sent yet" in told and "1 events are not sent" in told
    (there,) = runs_of(database, experiment)
    assert [(step, value) for _, _, step, value in points_at(database, there.info.run_id, "good")] == [
        (0, 1.0),
        (1, 2.0),
        (2, 3.0),
    ]
    long = there.data.params["long"]  # MLflow itself cuts without a word: mlflow/mlflow#11208
    assert (
        len(long) == 6000
        and "x… (cut: " in long
        and there.data.params["seed"] == "1"
        and there.info.status == "FINISHED"
    )
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    assert (sync(str(tmp_path)).sent, sync(str(tmp_path)).left) == (1, 0)
    assert [file.path for file in client(database).list_artifacts(there.info.run_id)] == ["later.json"]


def test_the_database_in_the_folder_moves_with_it(tmp_path: Path, experiment: str) -> None:
    run = Tracking(str(tmp_path / "before"), experiment, "name", {})
    run.metrics({"loss": 1.0}, 0)
    run.document({}, "summary.json")
    run.end("FINISHED")
    assert len(list((tmp_path / "before" / "mlartifacts").rglob("summary.json"))) == 1
    (tmp_path / "before").rename(tmp_path / "after")
    assert sync(str(tmp_path / "after")).sent == 0
    assert storage.read_json(f"{tmp_path}/after/tracking/sent.json").keys() == {"mlflow.db"}
    assert len(runs_of(f"sqlite:///{tmp_path}/after/mlflow.db", experiment)) == 1
    assert not (Path.cwd() / "mlruns").exists()
