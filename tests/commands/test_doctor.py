"""The doctor: what works is tried for real; what does not has a reason and a fix, and hides nothing else."""

import json
import socket
import threading
from contextlib import redirect_stdout
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import StringIO
from pathlib import Path

import numpy as np
import pytest

import manifests
from speechdistill import cli
from speechdistill.commands import doctor, doctor_trials
from speechdistill.commands.doctor import Doctor, Node, Result
from speechdistill.commands.doctor_trials import Places
from speechdistill.data.degradation_recipes import WEIGHTS_FREE
from speechdistill.data.degradations import denoisers
from speechdistill.io import audio, storage, table
from speechdistill.models.model import Model

SECRET = "hunter2/and+more"


class Run:
    """One run of the command: its exit code, its output, its results by name."""

    def __init__(self, *arguments: str) -> None:
        with redirect_stdout(StringIO()) as out:
            self.code = cli.main(["doctor", *arguments])
        self.text, self.tried = out.getvalue(), doctor.names()

    def results(self) -> dict[str, Result]:
        return {row["name"]: Result(**row) for row in json.loads(self.text)}


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """With an S3 store, an MLflow address that answers, and a manifest of real files."""
    import boto3
    from moto.server import ThreadedMotoServer

    folder = manifests.corpus(tmp_path_factory.mktemp("corpus"))
    files = [str(file) for file in folder.rglob("*.*")]
    rows = [manifests.row(file, Path(file).parent.name, audio.probe(file).duration_s) for file in files]
    storage.publish(table.parquet_bytes(table.from_rows(rows, "clip.v1")), f"{folder}/clips.parquet")
    store, mlflow = ThreadedMotoServer("127.0.0.1", port=0), HTTPServer(("127.0.0.1", 0), Health)
    store.start()
    threading.Thread(target=mlflow.serve_forever, daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "the-key-of-the-test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*store.get_host_and_port()))
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mlflow.server_port}")
        boto3.client("s3").create_bucket(Bucket="doctors")
        needed = [f"--require={name}" for name in ("weights_free", "distillmos", "flac", "clips", "out")]
        run = Run(*needed, "--out", "s3://doctors/labels", "--clips", f"{folder}/clips.parquet", "--json")
        assert "Contents" not in boto3.client("s3").list_objects_v2(Bucket="doctors")  # nothing stays behind
    mlflow.shutdown()
    store.stop()
    return run


@pytest.fixture(scope="module")
def sick(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Weights that were not installed, a library that crashes, files that are gone, servers that do not answer."""
    folder = tmp_path_factory.mktemp("sick")
    (folder / "distillmos").mkdir()
    (folder / "distillmos" / "__init__.py").touch()
    (folder / "espeakng_loader.py").write_text("import os\nos.abort()\n")
    storage.publish(table.parquet_bytes(manifests.manifest()), f"{folder}/clips.parquet")
    with socket.socket() as unused, pytest.MonkeyPatch.context() as patch:
        unused.bind(("127.0.0.1", 0))  # bound, but nobody listens
        patch.syspath_prepend(folder)
        patch.delenv("RAY_ADDRESS", raising=False)
        ill = ["teacher:distillmos", "degradation:denoisers.nsnet2", "degradation:generated.espeak", "recipe:paper"]
        tried = [*ill, "recipe:as_is", "storage:out", "clips", "tracking", "demo"]
        patch.setattr(doctor_trials, "names", lambda: tried)  # what is well is tried above
        patch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET.replace('/', '')}@127.0.0.1:{unused.getsockname()[1]}")
        places = ["--out", f"{folder}/espeakng_loader.py/labels", "--clips", f"{folder}/clips.parquet"]
        return Run("--require", "paper", "--require", "recipe:as_is", *places)


def test_what_the_platform_needs_works_here(healthy: Run) -> None:
    results = healthy.results()
    assert list(results) == doctor.names()
    assert healthy.code == 0
    needed = ["teacher:distillmos", *(name for name in results if name.startswith("format:"))]
    needed += [f"degradation:{name}" for name in WEIGHTS_FREE]
    needed += ["machine", "recipe:weights_free", "recipe:as_is", "demo"]
    assert {name: results[name].detail for name in needed if results[name].state != "ok"} == {}
    assert all(bool(result.fix) == (result.state != "ok") for result in results.values())
    for step in ("MeasuredRoom", "SimulatedRoom"):
        assert step in results["degradation:rooms.room"].detail
    for step in ("Babble", "ColouredNoise", "RecordedNoise"):
        assert step in results["degradation:noise.noise"].detail


def test_places_and_servers_that_work(healthy: Run) -> None:
    results = healthy.results()
    for name in ("storage:s3", "storage:out", "clips", "tracking"):
        assert results[name].state == "ok", results[name]
    assert results["storage:out"].detail == "s3://doctors/labels: written, read, listed, deleted"
    assert results["clips"].detail.startswith("6 speech, 1 noise, 1 rir; ")
    assert "AWS_SECRET_ACCESS_KEY" in results["storage:s3"].detail


def test_the_gpu_line_says_what_torch_sees(healthy: Run) -> None:
    import torch

    gpu = healthy.results()["gpu"]
    assert (gpu.state == "ok") == torch.cuda.is_available()
    assert torch.__version__ in gpu.detail


def test_a_component_that_is_not_there_says_what_to_use(sick: Run) -> None:
    assert sick.code == 1
    reason, fix = _lines(sick.text, "recipe:paper")
    assert reason.startswith("--  ") and "denoisers.nsnet2" in reason
    assert fix.startswith("fix: recipe 'weights_free' works without them; --without ")
    reason, fix = _lines(sick.text, "degradation:denoisers.nsnet2")
    assert reason.startswith("--  ") and "nsnet2-20ms-baseline.onnx" in reason and "--assets nsnet2 PATH" in reason
    assert "required, but does not work: recipe:paper" in sick.text
    assert "does not work: recipe:as_is" not in sick.text


def test_missing_weights_are_told_with_the_command_that_brings_them(sick: Run) -> None:
    reason, fix = _lines(sick.text, "teacher:distillmos")
    assert reason.startswith("--  ") and "no such weights file" in reason
    assert "pip install --no-deps distillmos" in fix


def test_a_crash_costs_only_its_own_line(sick: Run) -> None:
    reason, fix = _lines(sick.text, "demo")
    assert reason.startswith("FAILED") and "SIGABRT" in reason and fix.startswith("fix: ")
    assert [line.split()[1] for line in sick.text.splitlines() if line[:2] in ("ok", "--", "FA")] == sick.tried
    assert sick.text.splitlines()[-1].endswith("5 failed")  # espeak twice, storage:out, clips, tracking


def test_places_and_servers_that_do_not_work(sick: Run) -> None:
    for name, why in (("storage:out", "NotADirectory"), ("clips", "FileNotFound"), ("tracking", "refused")):
        reason, fix = _lines(sick.text, name)
        assert reason.startswith("FAILED") and why in reason, reason
        assert fix.startswith("fix: ")


def test_no_secret_is_printed(healthy: Run, sick: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SECRET not in healthy.text and "the-key-of-the-test" not in healthy.text
    assert SECRET.replace("/", "") not in sick.text
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    quoted = Result("storage:out", "failed", f"no access\nwith {SECRET} to https://me:word@host/x", f"not {SECRET}")
    assert quoted.detail == "no access with $AWS_SECRET_ACCESS_KEY to https://host/x"
    assert quoted.fix == "not $AWS_SECRET_ACCESS_KEY"


def test_a_wrong_result_is_no_success(monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(name: str) -> str:
        kind, _, member = name.partition(":")
        return doctor_trials.TRIALS[kind](member, Places(out="other than in other tests"))

    monkeypatch.setattr(denoisers.SpectralGating, "apply", lambda self, wave: wave * np.nan)
    for name in ("degradation:denoisers.spectral_gating", "recipe:weights_free"):
        with pytest.raises(ArithmeticError, match="not finite"):
            tried(name)
    monkeypatch.setattr(Model, "__call__", lambda self, wave, sample_rate: float("nan"))
    with pytest.raises(ArithmeticError, match="a score of nan"):
        tried("teacher:distillmos")
    monkeypatch.setattr(audio, "load", lambda uri: np.random.default_rng(0).standard_normal(32_000))
    with pytest.raises(ArithmeticError, match="correlation"):
        tried("format:wav")


def test_storage_is_really_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tried(out: str) -> str:
        return doctor_trials.TRIALS["storage"]("out", Places(out=out))

    assert "written, read, listed, deleted" in tried(f"{tmp_path}/new/deep")
    assert "written, read, listed, deleted" in tried("memory://labels")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="nosuch"):
        tried("nosuch://bucket/labels")
    (tmp_path / "kept").mkdir()
    # A store that lies.
    monkeypatch.setattr(storage, "publish", lambda data, uri: Path(uri).write_bytes(data[:-1]))
    with pytest.raises(OSError, match="read or listed differently"):
        tried(f"{tmp_path}/kept")
    assert list(tmp_path.rglob("*")) == [tmp_path / "kept"]


def test_tracking_without_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def tracking(out: str | None = None) -> str:
        return doctor_trials.TRIALS["tracking"]("", Places(out=out))

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert "mlflow.db in each run's folder" in tracking()
    with pytest.raises(ValueError, match="set MLFLOW_TRACKING_URI"):
        tracking("s3://doctors/labels")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert "can be written" in tracking("s3://doctors/labels")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/missing/mlflow.db")
    with pytest.raises(Exception, match="unable to open database"):
        tracking()


@pytest.mark.parametrize(
    ("word", "said"),
    [("nonsense", "is unknown; choose from machine, teacher:distillmos"), ("", "is unknown")],
)
def test_an_unknown_name_is_refused_before_any_work(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--require", word]) == 1
    captured = capsys.readouterr()
    assert said in captured.err and captured.out == ""


def test_names_may_be_short() -> None:
    assert doctor.required(("weights_free", "codecs.opus", "opus", "cluster", "recipe:paper")) == [
        "recipe:weights_free",
        "degradation:codecs.opus",
        "format:opus",
        "cluster",
        "recipe:paper",
    ]


def test_nodes_are_compared_with_this_machine() -> None:
    here = {"torch": "2.13.0", "libavcodec": "62.11.100"}
    teacher, gpu = Result("teacher:distillmos", "ok", "MOS 1.2"), Result("gpu", "missing", "no GPU", "-")
    no_teacher = Result("teacher:distillmos", "missing", "no weights", "install them")
    answers: dict[str, Node | Exception] = {
        "alike": Node(here, [Result("machine", "ok", "16 CPUs"), gpu, teacher]),
        "older": Node({**here, "torch": "2.12.1"}, [gpu, teacher]),
        "bare": Node(here, [gpu, no_teacher]),
        "dead": ModuleNotFoundError("No module named 'soundfile'"),
    }
    alike, older, bare, dead = doctor.compared(here, ["teacher:distillmos"], answers)
    assert (alike.state, alike.detail, alike.fix) == ("ok", "16 CPUs", "")
    assert (older.name, older.state, older.detail) == ("node:older", "failed", "torch 2.12.1, here 2.13.0")
    assert "pip install -r" in older.fix
    assert (bare.state, bare.detail, bare.fix) == ("failed", "teacher:distillmos: no weights", "install them")
    assert dead.state == "failed" and "soundfile" in dead.detail and "pyproject.toml" in dead.fix
    (not_wanted,) = doctor.compared(here, [], {"bare": answers["bare"]})  # it does not work here either
    assert not_wanted.state == "ok"


def test_a_cluster_is_asked_node_by_node(local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    # This process has another noisereduce, by its metadata, than the node; all else is alike.
    (tmp_path / "noisereduce-0.0.1.dist-info").mkdir()
    (tmp_path / "noisereduce-0.0.1.dist-info" / "METADATA").write_text("Name: noisereduce\nVersion: 0.0.1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
    some = ["machine", "degradation:levels.clipping", "format:flac", "storage:out"]
    monkeypatch.setattr(doctor_trials, "names", lambda: some)
    config = Doctor(require=("cluster",), out=f"{tmp_path}/labels")
    results = {result.name: result for result in doctor.run(config)}
    assert results["cluster"].state == "failed"
    assert doctor.unmet(config, list(results.values())) == ["cluster"]
    (node,) = (result for name, result in results.items() if name.startswith("node:"))
    assert node.name in results["cluster"].fix
    assert node.detail.startswith("noisereduce 3.") and node.detail.endswith(", here 0.0.1")
    assert ";" not in node.detail  # the versions else, and every trial on the node


def _lines(text: str, name: str) -> tuple[str, str]:
    """The line of `name` in a report, and the fix below it."""
    lines = text.splitlines()
    number = next(i for i, line in enumerate(lines) if line.split()[1:2] == [name])
    return lines[number], lines[number + 1].strip()
