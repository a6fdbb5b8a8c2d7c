"""What commit 446974e wrote is still read: its models load and its runs resume, wherever the code lies by now.

`fixtures/446974e` was written by that commit; `expected.json` there says what came out. Its recordings are at
s3:// addresses, which a moto server answers here.
"""

import base64
import contextlib
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs
import soundfile
import torch

import speechdistill
from comparisons import without_ray
from faults import s3
from manifests import voice
from mlflow_runs import Store, serving
from speechdistill import cli
from speechdistill.data.degradation_recipes import weights_free
from speechdistill.engine import flow, shards
from speechdistill.io import audio, fingerprint, storage, table
from speechdistill.labelling import features, samples
from speechdistill.models.student import load_student
from speechdistill.tracking.run import run_id, sync
from speechdistill.training import launch

STORED = Path(__file__).parent / "fixtures" / "446974e"
EXPECTED: Any = storage.read_json(f"{STORED}/expected.json")
BUCKET = "speechdistill-446974e"
RATE = 16_000
CHAMPION = "models:/quality@champion"


def wave() -> np.ndarray:
    """What the expected scores are of."""
    return voice(3.0, seed=7)


def cpu() -> dict[str, Any]:
    """What decides bits beside the libraries' versions."""
    known: dict[str, bool] = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
    enabled = sorted(name for name, is_there in known.items() if is_there)
    return {"machine": platform.machine(), "torch": torch.backends.cpu.get_cpu_capability(), "numpy": enabled}


def options() -> dict[str, list[str]]:
    """Of every command and sub-command, what `--help` shows: its options, and the words of its positional arguments."""
    found: dict[str, list[str]] = {}
    waiting: list[tuple[str, ...]] = [()]
    while waiting:
        command = waiting.pop()
        names, commands = _shown(_help(command))
        waiting += [(*command, name) for name in commands]
        if command:
            found[" ".join(command)] = sorted({*names, *commands})
    return dict(sorted(found.items()))


def _help(command: tuple[str, ...]) -> str:
    text = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        patch.setenv("COLUMNS", "120")  # wider, boxes stand side by side
        cli.main([*command, "--help"])
    return re.sub(r"\x1b\[[\d;]*m", "", text.getvalue())


def _shown(text: str) -> tuple[list[str], list[str]]:
    """The words of the arguments and the sub-commands in a page of help, in boxes or, where they cannot be printed,
    without.
    """
    names, commands, box = [], [], ""
    for line in text.replace("│", " ").splitlines():
        if match := re.match(r"(?:╭─)? (positional arguments|options|subcommands) ", line):
            box = match[1]
        elif match := re.match(r"    • ([\w-]+)", line):
            commands.append(match[1])
        elif (match := re.match(r"  (\S.*?)  ", line)) and box != "subcommands":
            names += re.findall(r"--[\w-]+" if box == "options" else r"\w[\w-]*", match[1])
    return names, commands


def copied(name: str, folder: Path) -> str:
    """A copy of a stored folder, which a job may change."""
    return str(shutil.copytree(STORED / name, folder / name))


def renewed(out: str, **installed: Any) -> bool:
    """Put what is installed here in a run's configuration; says whether it had the same, so that its bits must return.

    Another machine has other versions, with which a run is rightly refused.
    """
    document: Any = storage.read_json(f"{out}/run.json")
    configuration = document["configuration"]
    assert document["fingerprint"] == fingerprint.of(configuration)
    same = {**configuration, **installed} == configuration and cpu() == EXPECTED["cpu"]
    configuration |= installed
    document["fingerprint"] = fingerprint.of(configuration)
    storage.publish_json(document, f"{out}/run.json")
    return bool(same)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): fingerprint.of_file(str(file)) for file in folder.rglob("*") if file.is_file()
    }


def labels(part: Path) -> dict[str, Any]:
    """What is expected of a label run's part; plans and scores hold on other machines too."""
    rows = pq.read_table(part)
    return {
        "content_sha256": shards.content_hash(rows),
        "sample_id": rows["sample_id"].to_pylist(),
        "plans": fingerprint.of(rows["plan"].to_pylist()),
        "score": rows["score"].to_pylist(),
    }


@pytest.fixture(scope="module")
def mlflow_store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """An MLflow whose `quality@champion` is the stored model."""
    store = Store(tmp_path_factory.mktemp("store"))
    run = store.run()
    model = store.client.create_logged_model(store.experiment, "student", run, model_type="speech-quality")
    store.client.log_model_artifacts(model.model_id, str(STORED / "model"))
    store.client.finalize_logged_model(model.model_id, "READY")
    store.client.create_registered_model("quality")
    version = store.client.create_model_version("quality", model.artifact_location, run, model_id=model.model_id)
    store.client.set_registered_model_alias("quality", "champion", version.version)
    return store


@pytest.fixture(autouse=True)
def tracked_here(mlflow_store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_store.uri)
    monkeypatch.chdir(tmp_path)  # where an MLflow without a server puts artifacts


@pytest.fixture
def clips_on_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The recordings where the stored runs have them."""
    with s3.Store() as store:
        store.fs.mkdir(BUCKET)
        store.fs.put(str(STORED / "clips"), f"{BUCKET}/clips", recursive=True)
        cache = {"SPEECHDISTILL_CACHE": f"{tmp_path}/cache"}
        for name, value in {**s3.CREDENTIALS, "AWS_ENDPOINT_URL": store.url, **cache}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "voice.wav", wave(), RATE, subtype="FLOAT")
    return tmp_path / "voice.wav"


def score() -> Any:
    return pytest.approx(EXPECTED["student"]["score"], abs=1e-4)  # sums in another order


def test_a_student_scores_as_it_did() -> None:
    student = load_student(str(STORED / "student"))
    assert student.weights_hash == EXPECTED["student"]["sha256"]
    assert student.provenance["git_commit"]
    assert speechdistill.load(str(STORED / "student"))(wave(), RATE) == score()


def test_a_model_in_mlflow_is_read_by_our_own_tools() -> None:
    assert speechdistill.load(CHAMPION)(wave(), RATE) == score()


PREDICTED = """
import json, sys
import mlflow.pyfunc, pandas
model = mlflow.pyfunc.load_model(sys.argv[1])
import speechdistill
data = open(sys.argv[2], "rb").read()
(answer,) = model.predict(pandas.DataFrame({"audio": [data]})).to_dict("records")
print(json.dumps([speechdistill.__file__, answer["mos"], answer["error"]]))
"""


@pytest.mark.server
def test_a_model_in_mlflow_loads_with_the_code_that_is_stored_with_it(recording: Path) -> None:
    """In a new process, where today's package could be imported too."""
    command = [sys.executable, "-c", PREDICTED, CHAMPION, str(recording)]
    run = subprocess.run(command, cwd=recording.parent, stdout=subprocess.PIPE, text=True, check=True)
    file, mos, error = json.loads(run.stdout)
    assert file.endswith("/code/speechdistill/__init__.py") and file != speechdistill.__file__
    assert (mos, error) == (score(), None)


@pytest.mark.server
def test_a_model_in_mlflow_is_served(mlflow_store: Store, recording: Path) -> None:
    records = [{"audio": base64.b64encode(recording.read_bytes()).decode()}]
    with serving(CHAMPION, mlflow_store.uri, recording.parent) as url:
        body = json.dumps({"dataframe_records": records}).encode()
        request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=240) as answer:
            assert json.load(answer)["predictions"] == [{"mos": score(), "error": None}]


def test_a_label_run_goes_on(clips_on_s3: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, expected = copied("labels", tmp_path), EXPECTED["labels"]
    same = renewed(out, libraries=samples.libraries(weights_free()))
    there, missing = (Path(out, "shards", name) for name in expected["parts"])
    before = there.stat()
    monkeypatch.setattr(flow, "run", without_ray)
    command = ["pseudolabel", "--clips", f"{out}/clips.parquet", "--teacher", str(STORED / "student"), "--out", out]
    assert cli.main([*command, *expected["options"]]) == 0

    assert there.stat().st_mtime_ns == before.st_mtime_ns
    made, promised = labels(missing), expected["missing"]
    if same:
        assert made["content_sha256"] == promised["content_sha256"]
    assert [made[key] for key in ("sample_id", "plans")] == [promised[key] for key in ("sample_id", "plans")]
    assert made["score"] == pytest.approx(promised["score"], abs=0.01)  # of a little other audio on another machine
    files = table.read(f"{out}/manifest.parquet", "shard.v1")
    assert files["path"].to_pylist() == [f"shards/{name}" for name in expected["parts"]]
    assert files["content_sha256"][0].as_py() == expected["there"]["content_sha256"] == labels(there)["content_sha256"]


def test_students_go_on_from_their_checkpoint(local_ray: None, mlflow_store: Store, tmp_path: Path) -> None:
    shards_of, out, expected = copied("labels_complete", tmp_path), copied("students", tmp_path), EXPECTED["students"]
    assert cli.main(["train-students", "--shards", shards_of, *expected["options"], "--out", out]) == 0
    # Those that begin anew validate at the checkpoint's step, too.
    points = mlflow_store.client.get_metric_history(str(run_id(f"{out}/tiny")), "validation/mse")
    assert [point.step for point in points] == [expected["summary"]["steps"]]
    summary: Any = storage.read_json(f"{out}/tiny/summary.json")
    assert summary["steps"] == expected["summary"]["steps"]
    assert summary["best"] == pytest.approx(expected["summary"]["best"], rel=1e-3)
    load_student(f"{out}/tiny/best")


def test_a_teacher_is_what_the_same_command_finds(local_ray: None, tmp_path: Path) -> None:
    """Without its recordings: the features are there."""
    out, expected = copied("teacher", tmp_path), EXPECTED["teacher"]
    source, encoder = str(STORED / "scored.parquet"), str(STORED / "encoder")
    clips, _ = launch.scored(source, out, features.scored_clips)
    renewed(f"{out}/features", libraries=audio.codec_versions(), clips_sha256=fingerprint.of_file(clips))
    before = [contents(Path(out, name)) for name in ("features/shards", "teacher/best")]
    command = ["train-teacher", "--labeled", source, "--encoder", encoder, *expected["options"], "--out", out]
    assert cli.main(command) == 0
    assert [contents(Path(out, name)) for name in ("features/shards", "teacher/best")] == before
    scorer = speechdistill.load(f"{out}/teacher/best", weights=encoder)
    assert scorer(wave(), RATE) == pytest.approx(expected["score"], abs=1e-3)


def test_a_tracking_log_is_sent(mlflow_store: Store, tmp_path: Path) -> None:
    found = sync(copied("tracked", tmp_path))
    assert found.sent and not found.left
    points = mlflow_store.client.get_metric_history(found.run_id, "validation/mse")
    assert [point.step for point in points] == [10, 20]
    assert mlflow_store.client.get_run(found.run_id).data.params["variants"] == "tiny"


def test_every_option_is_still_there() -> None:
    today = options()
    stored: dict[str, list[str]] = json.loads((STORED / "options.json").read_text())
    lost = {command: sorted({*names} - {*today.get(command, [])}) for command, names in stored.items()}
    assert not any(lost.values()), lost
