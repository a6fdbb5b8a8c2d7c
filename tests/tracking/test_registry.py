"""Students in MLflow: logged, loaded where this package is not, served, fetched by address."""

import ast
import base64
import json
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from importlib.metadata import packages_distributions, version
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from packaging.requirements import Requirement

import speechdistill
from manifests import voice
from mlflow_runs import PROVENANCE, Store, serving, student
from small_models import speech_encoder
from speechdistill import cli
from speechdistill.data.label_scale import Scale
from speechdistill.io import audio, fingerprint
from speechdistill.models.encoder_scorer import HEAD, TrainedHead
from speechdistill.models.networks.conv_transformer import QualityHead
from speechdistill.models.networks.speech_encoder import load as load_encoder
from speechdistill.tracking import model_code
from speechdistill.tracking.mlflow_model import save_model
from speechdistill.tracking.registry import Logged, Registry, RegistryError, log_student, student_folder

RATE = 44_100


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return student(tmp_path_factory.mktemp("checkpoint") / "best")


@pytest.fixture(scope="module")
def logged(store: Store, checkpoint: str) -> Logged:
    """A logged student that is `quality@champion` and `quality/1`."""
    model = log_student(checkpoint, store.run(), store.uri)
    ours = Registry(store.uri)
    ours.point("quality", "champion", ours.register("quality", model))
    return model


@pytest.fixture(autouse=True)
def tracked_here(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.uri)


def wav(wave: np.ndarray, sample_rate: int = RATE) -> bytes:
    file = BytesIO()
    soundfile.write(file, wave, sample_rate, format="WAV", subtype="FLOAT")
    return file.getvalue()


def ours(checkpoint: str, data: bytes, folder: Path) -> float:
    """The score of our own scorer for the bytes of a file."""
    (folder / "clip.wav").write_bytes(data)
    return speechdistill.load(checkpoint)(audio.load(str(folder / "clip.wav")), audio.SAMPLE_RATE)


def test_a_run_keeps_the_student_with_its_provenance(store: Store, checkpoint: str, logged: Logged) -> None:
    import mlflow

    about = mlflow.models.get_model_info(logged.uri)
    digest = fingerprint.of_file(f"{checkpoint}/model.safetensors")
    assert about.metadata == {"provenance": PROVENANCE, "weights_sha256": digest}
    assert about.signature and about.saved_input_example_info and about.run_id == logged.run_id
    tags = store.client.get_logged_model(logged.model_id).tags
    assert tags == {
        "weights_sha256": digest,
        "provenance.shards": json.dumps(PROVENANCE["shards"]),
        "provenance.teacher_sha256": "b18b",
        "provenance.git_commit": "77e141e",
    }
    (output,) = store.client.get_run(logged.run_id).outputs.model_outputs
    assert output.model_id == logged.model_id


def test_the_same_weights_are_logged_to_a_run_once(store: Store, tmp_path: Path, logged: Logged) -> None:
    run = store.run()
    first = log_student(student(tmp_path / "a"), run)
    assert log_student(student(tmp_path / "a"), run) == first
    second = log_student(student(tmp_path / "b", seed=1), run)
    assert Registry().logged(run) == [second, first]


def test_a_log_that_failed_is_not_taken_for_a_student(
    store: Store, checkpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = store.run()
    monkeypatch.setattr(model_code, "needed", lambda with_encoder: {model_code.ENTRY.parent / "torn.py"})
    with pytest.raises(RegistryError, match=f"run {run}.*torn.py"):
        log_student(checkpoint, run)
    assert Registry().logged(run) == []


def test_the_requirements_of_the_stored_code_name_what_it_imports_from_elsewhere() -> None:
    outside = {name for file in (model_code.ENTRY, *model_code.needed(True)) for name in _imports(file)}
    optional = {"jsonschema", "huggingface_hub"}  # for documents that a model has none of; comes with transformers
    ours = {"speechdistill", *sys.stdlib_module_names}
    distributions = packages_distributions()
    needed = {min(distributions[name], key=len).lower() for name in outside - ours - optional}
    requirements = {
        line.name: line for line in map(Requirement, (*model_code.REQUIREMENTS, *model_code.ENCODER_REQUIREMENTS))
    }
    assert needed == set(requirements)
    for name, line in requirements.items():
        assert {item.operator for item in line.specifier} == {">=", "<"}, line
        assert version(name).partition("+")[0] in line.specifier, line


def test_the_stored_code_of_a_student_has_no_encoder_and_no_engine() -> None:
    package = model_code.ENTRY.parents[1]
    student, head = ({str(file.relative_to(package)) for file in model_code.needed(flag)} for flag in (False, True))
    assert {"__init__.py", "models/student_scorer.py", "models/networks/conv_transformer.py"} <= student < head
    assert head - student >= {"models/encoder_scorer.py", "models/networks/speech_encoder.py"}
    assert not any(file.startswith(("engine/", "training/", "tracking/")) for file in head)


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    plain = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    named = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    return {name.partition(".")[0] for name in plain | named}


ELSEWHERE = """
import importlib.util, sys
sys.path[:] = [path for path in sys.path if path] + [sys.argv[2]]  # without the .pth file of an editable install
assert importlib.util.find_spec("speechdistill") is None
import mlflow.pyfunc, numpy, pandas
model = mlflow.pyfunc.load_model(sys.argv[1], model_config={"encoder": sys.argv[4]} if sys.argv[4:] else None)
import speechdistill
data = open(sys.argv[3], "rb").read()
(answer,) = model.predict(pandas.DataFrame({"audio": [data]})).to_dict("records")
print(speechdistill.__file__, repr(answer["mos"]), answer["error"], "torchaudio" in sys.modules)
"""


@pytest.mark.server
def test_a_model_loads_where_this_package_is_not_installed(logged: Logged, checkpoint: str, tmp_path: Path) -> None:
    expected = ours(checkpoint, wav(voice(3.0, RATE)), tmp_path)
    folder = tmp_path / "model"
    import mlflow

    mlflow.artifacts.download_artifacts(artifact_uri=logged.location, dst_path=str(folder))
    (model,) = (path.parent for path in folder.rglob("MLmodel"))
    assert elsewhere(model, tmp_path / "clip.wav") == (expected, "None", "False")


def elsewhere(model: Path, recording: Path, *more: str) -> tuple[float, str, str]:
    arguments = [str(model), sysconfig.get_paths()["purelib"], str(recording), *more]
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", ELSEWHERE, *arguments], cwd=model, stdout=subprocess.PIPE, check=True
    )
    file, score, error, torchaudio = run.stdout.decode().split()
    assert file == f"{model}/code/speechdistill/__init__.py"
    return float(score), error, torchaudio


@pytest.mark.server
def test_a_head_loads_there_too_and_its_encoder_may_have_moved(tmp_path: Path) -> None:
    place = speech_encoder(tmp_path / "encoder", "wav2vec2", large=True)
    digest = load_encoder(place, 2).digest
    about = TrainedHead(place, digest, 2, Scale(1.5, 0.2))
    about.save(QualityHead(16, *HEAD), f"{tmp_path}/head", {})
    expected = ours(f"{tmp_path}/head", wav(voice(3.0, RATE)), tmp_path)
    save_model(f"{tmp_path}/head", f"{tmp_path}/model")
    moved = (tmp_path / "encoder").rename(tmp_path / "moved")
    score, *rest = elsewhere(tmp_path / "model", tmp_path / "clip.wav", str(moved))
    assert (score, *rest) == (pytest.approx(expected, abs=1e-5), "None", "False")


def ask(url: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    body = json.dumps({"dataframe_records": records}).encode()
    request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=240) as answer:
        return list(json.load(answer, parse_constant=pytest.fail)["predictions"])  # NaN is no JSON


@pytest.mark.server
def test_a_served_model_answers_with_our_own_scores(
    store: Store, logged: Logged, checkpoint: str, tmp_path: Path
) -> None:
    short, long = voice(3.0, RATE), voice(12.0, RATE, seed=1)
    expected = [ours(checkpoint, wav(wave), tmp_path) for wave in (short, long)]
    assert abs(expected[0] - expected[1]) > 1e-3
    files = [{"audio": base64.b64encode(wav(wave)).decode()} for wave in (short, long)]
    with serving("models:/quality@champion", store.uri, tmp_path) as url:
        no_audio = [
            {"audio": text} for text in (base64.b64encode(b"no audio at all").decode(), "no base64!", "abcde", "é")
        ]
        waves = [{"waveform": wave.tolist(), "sample_rate": RATE} for wave in (short, long, np.zeros(RATE))]
        answers = ask(url, [*files, *no_audio, waves[0]])
        assert [row["mos"] for row in answers[:2]] == expected
        assert answers[0]["error"] is None
        assert "not audio" in answers[2]["error"] and [row["mos"] for row in answers[2:6]] == [None] * 4
        assert all("audio is not base64" in row["error"] for row in answers[3:6])
        assert answers[6]["mos"] == pytest.approx(expected[0], abs=1e-5)

        answers = ask(url, waves)
        assert [row["mos"] for row in answers[:2]] == pytest.approx(expected, abs=1e-5)
        assert (answers[2]["mos"], answers[2]["error"]) == (None, "silent (peak below -80 dBFS)")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"audio": b"RIFF"}, "not audio"),
        ({"audio": b""}, "empty file"),
        ({"audio": wav(np.full(RATE, np.nan))}, "NaN"),
        ({"audio": wav(voice(1.0))[:9000]}, "truncated"),
        ({"waveform": [0.1, -0.1] * 100, "sample_rate": 16_000}, "shorter than 0.1 s"),
        ({"waveform": [0.1, -0.1] * 8000}, "without sample_rate"),
        ({"waveform": [0.1, -0.1] * 8000, "sample_rate": 1}, "sample rate 1 Hz; choose 1000"),
        ({"waveform": [0.1, -0.1] * 8000, "sample_rate": "fast"}, "sample_rate 'fast' is not a number"),
        ({"waveform": ["loud"], "sample_rate": 16_000}, "waveform is not a list of numbers"),
        ({"audio": "no base64!"}, "audio is not base64"),
        ({"sample_rate": 16_000}, "give either audio"),
        ({"audio": wav(voice(1.0)), "waveform": [0.1, -0.1] * 8000, "sample_rate": 16_000}, "give either audio"),
    ],
)
def test_a_recording_without_a_score_says_why(logged: Logged, record: dict[str, Any], reason: str) -> None:
    import mlflow
    import pandas

    model = mlflow.pyfunc.load_model(logged.uri)
    (answer,) = model.predict(pandas.DataFrame([record])).to_dict("records")
    assert answer["mos"] is None
    assert reason in answer["error"]


def test_every_address_of_a_student_gives_the_same_weights(logged: Logged, checkpoint: str) -> None:
    digest = fingerprint.of_file(f"{checkpoint}/model.safetensors")
    run = f"runs:/{logged.run_id}/student"
    for address in ("models:/quality@champion", "models:/quality/1", logged.uri, run, checkpoint):
        with student_folder(address) as folder:
            assert fingerprint.of_file(f"{folder}/model.safetensors") == digest
        assert Path(folder).exists() == (address == checkpoint)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        (
            "models:/nobody@champion",
            "no model 'nobody' is registered at sqlite.*; choose from quality, or set MLFLOW_TRACKING_URI",
        ),
        (
            "models:/quality@second",
            "model 'quality' at sqlite.* has no version with the alias 'second'; its aliases: champion; give models:/",
        ),
        ("models:/quality/9", "models:/quality/9: .*not found"),
        ("models:/m-00", "models:/m-00: .*not found"),
        ("runs:/00/student", "run 00: .*not found"),
        ("models:/quality", "not the address of a student; choose from models:/NAME@ALIAS"),
    ],
)
def test_an_address_that_leads_nowhere_is_named(logged: Logged, address: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message), student_folder(address):
        pass


def test_a_moved_folder_of_runs_has_its_models(store: Store, logged: Logged, checkpoint: str, tmp_path: Path) -> None:
    moved = shutil.copytree(Path(store.uri.removeprefix("sqlite:///")).parent, tmp_path / "moved")
    there = Registry(f"sqlite:///{moved}/mlflow.db")
    version = there.by_alias("quality", "champion")
    assert version and version.source.startswith((moved / "mlartifacts").as_uri())
    assert there.logged(logged.run_id)[0].location == version.source
    with student_folder("models:/quality@champion", there.uri) as folder:
        assert fingerprint.of_file(f"{folder}/model.safetensors") == fingerprint.of_file(
            f"{checkpoint}/model.safetensors"
        )


def test_weights_that_were_swapped_in_the_store_are_not_used_under_its_name(
    store: Store, logged: Logged, tmp_path: Path
) -> None:
    shutil.copytree(Path(store.uri.removeprefix("sqlite:///")).parent, tmp_path / "copy")
    there = Registry(f"sqlite:///{tmp_path}/copy/mlflow.db")
    version = there.register("swapped", there.logged(logged.run_id)[0])
    (file,) = (tmp_path / "copy").glob(f"**/{logged.model_id}/**/model.safetensors")
    shutil.copy(Path(student(tmp_path / "other", seed=5)) / "model.safetensors", file)
    for address in (logged.uri, f"runs:/{logged.run_id}/student", version.uri):
        with pytest.raises(RegistryError, match="differ from the logged ones"), student_folder(address, there.uri):
            pass


def test_without_an_mlflow_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    with pytest.raises(RegistryError, match="set MLFLOW_TRACKING_URI"):
        Registry()
    with pytest.raises(RegistryError, match="no such database"):
        Registry(f"sqlite:///{tmp_path}/mlflow.db")
    assert not list(tmp_path.iterdir())
    with pytest.raises(RegistryError, match=r"//127\.0\.0\.1:9: ") as error:
        Registry("http://user:secret@127.0.0.1:9").by_alias("quality", "champion")
    assert "secret" not in str(error.value)


def test_the_command_scores_with_the_champion(logged: Logged, checkpoint: str, tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.wav", voice(20.0), audio.SAMPLE_RATE)
    wave = audio.load(str(tmp_path / "long.wav"))

    def command(*options: str) -> list[dict[str, Any]]:
        out = str(tmp_path / "out.json")
        assert cli.main(["score", str(tmp_path / "long.wav"), "--out", out, *options]) == 0
        return list(json.loads(Path(out).read_text()))

    champion = ["--model", "models:/quality@champion"]
    settings: list[tuple[list[str], dict[str, Any]]] = [
        ([], {}),
        (["--hop-s", "7.68"], {"hop_s": 7.68}),
        (["--dtype", "bfloat16"], {"dtype": "bfloat16"}),
    ]
    for options, same in settings:
        (row,) = command(*champion, *options)
        assert row["mos"] == speechdistill.load(checkpoint, **same)(wave, audio.SAMPLE_RATE)
    assert len(command(*champion, "--timeline")) == 20
    assert command("--model", checkpoint) == command(*champion)


def test_the_command_names_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    soundfile.write(tmp_path / "a.wav", voice(1.0), audio.SAMPLE_RATE)
    for model, reason in (
        ("models:/nobody@champion", "error: no model 'nobody' is registered at sqlite"),
        (f"{tmp_path}/nothing", f"{tmp_path}/nothing holds no checkpoint"),
        ("dnsmos9", "teacher 'dnsmos9' is unknown; choose from ['distillmos', 'dnsmos_p808', 'dnsmos_p835', "),
    ):
        assert cli.main(["score", str(tmp_path / "a.wav"), "--model", model]) == 1
        assert reason in capsys.readouterr().err
