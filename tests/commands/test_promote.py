"""Promotion at a real MLflow: which run, against which champion, and what is moved."""

import csv
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import speechdistill
from manifests import voice
from mlflow_runs import Store, student, tracking_server
from speechdistill import cli
from speechdistill.commands import promote as promote_command
from speechdistill.data import heard, scored_clips
from speechdistill.io import audio, checkpoint
from speechdistill.io.errors import UnreadableError
from speechdistill.models.student import load_student, save_student
from speechdistill.tracking import registry
from speechdistill.tracking.registry import Logged, RegistryError, log_student, student_folder

RATE = audio.SAMPLE_RATE


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return [student(folder / str(seed), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Forty recordings that students score differently."""
    folder = tmp_path_factory.mktemp("clips")
    paths = [str(folder / f"{i}.wav") for i in range(40)]
    for i, path in enumerate(paths):
        noise = (i % 5) * 0.02 * np.random.default_rng(i).standard_normal(RATE)
        soundfile.write(path, voice(1.0, seed=i) + noise, RATE, subtype="FLOAT")
    return paths


@pytest.fixture(scope="module")
def said(checkpoints: list[str], clips: list[str]) -> list[float]:
    """Listeners who agree with the second student, but for a little noise."""
    model = speechdistill.load(checkpoints[1])
    scores = np.array([model(audio.load(path), RATE) for path in clips])
    spread = (scores - scores.mean()) / scores.std()
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(scores))
    return [float(mos) for mos in np.clip(3 + 0.5 * spread + noise, 1, 5)]


@pytest.fixture
def source(tmp_path: Path, clips: list[str], said: list[float]) -> str:
    return listed(tmp_path / "eval.csv", [(*pair, "ab"[i % 2]) for i, pair in enumerate(zip(clips, said, strict=True))])


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a training run."""
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def store(out: Path) -> Store:
    return Store(out)


@pytest.fixture(autouse=True)
def nothing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def name() -> str:
    """The model name of one test."""
    return f"quality-{uuid.uuid4().hex}"


@pytest.fixture
def models(store: Store, checkpoints: list[str]) -> list[Logged]:
    """A run each: the first student, and the second, which listeners agree with."""
    return [log_student(checkpoint, store.run(), store.uri) for checkpoint in checkpoints]


def listed(path: Path, rows: list[tuple[str, float, str]], *more: str) -> str:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("path", "mos", "dataset", *more), *rows])
    return str(path)


@pytest.fixture
def promote(out: Path, name: str, source: str, capsys: pytest.CaptureFixture[str]) -> Any:
    def command(run: str | None = None, *options: str, clips: str | None = source) -> tuple[int, Any]:
        arguments = ["promote", "--tracking", str(out), "--model-name", name, *options]
        arguments += ["--run", run] if run else []
        arguments += ["--eval", clips] if clips and run else []
        capsys.readouterr()
        code = cli.main(arguments)
        printed, errors = capsys.readouterr()
        return code, (json.loads(printed) if code in (0, 3) else errors)

    return command


def aliases(store: Store, name: str) -> dict[str, str]:
    found = store.client.search_registered_models(f"name = '{name}'")
    return {alias: str(number) for model in found for alias, number in model.aliases.items()}


def test_the_better_student_becomes_champion_and_can_be_taken_back(
    store: Store, name: str, models: list[Logged], promote: Any
) -> None:
    weak, strong = models
    code, first = promote(weak.run_id)
    assert (code, first["decision"], first["reason"]) == (0, "promoted", "there is no champion yet")
    assert aliases(store, name) == {"champion": "1"}

    code, second = promote(strong.run_id)
    assert (code, second["decision"]) == (0, "promoted")
    assert second["mean_pcc"]["candidate"] > 0.9 > second["mean_pcc"]["champion"]
    assert second["difference"]["low"] > 0
    assert [(row["dataset"], row["clips"]) for row in second["datasets"]] == [("a", 20), ("b", 20)]
    weighted = np.mean([row["candidate"] for row in second["datasets"]])
    assert second["mean_pcc"]["candidate"] == pytest.approx(weighted)
    assert aliases(store, name) == {"champion": "2", "previous": "1"}

    assert promote(None, "--rollback", "--dry-run")[0] == 0 and aliases(store, name)["champion"] == "2"
    code, back = promote(None, "--rollback")
    assert (code, back["decision"], back["champion"]["number"]) == (0, "rolled_back", "1")
    assert aliases(store, name) == {"champion": "1", "previous": "2"}


def test_a_first_champion_that_does_not_follow_listeners_needs_force(
    store: Store, name: str, models: list[Logged], promote: Any, tmp_path: Path, clips: list[str], said: list[float]
) -> None:
    against = listed(tmp_path / "against.csv", [(clips[i], 6 - said[i], "a") for i in range(10)])
    code, decision = promote(models[1].run_id, clips=against)
    assert (code, decision["decision"], aliases(store, name)) == (3, "kept", {})
    assert f"is {decision['mean_pcc']['candidate']:.4f}, below 0.3; give --force" in decision["reason"]
    assert promote(models[1].run_id, "--force", clips=against)[1]["decision"] == "promoted"
    assert aliases(store, name) == {"champion": "1"}


def test_a_worse_student_is_registered_and_not_promoted(
    store: Store, name: str, models: list[Logged], promote: Any
) -> None:
    weak, strong = models
    promote(strong.run_id)
    code, decision = promote(weak.run_id)
    assert (code, decision["decision"]) == (3, "kept")
    assert decision["difference"]["value"] < 0 and "the margin is" in decision["reason"]
    assert aliases(store, name) == {"champion": "1"}
    tags = store.client.get_model_version(name, "2").tags
    assert tags["promotion.decision"] == "kept" and tags["promotion.against_version"] == "1"
    assert json.loads(tags["promotion.datasets"]) == decision["datasets"]
    assert tags["provenance.git_commit"] == "77e141e"
    file = store.client.download_artifacts(weak.run_id, f"promotion/{name}.json")
    assert json.loads(Path(file).read_text()) == decision


def test_a_better_student_within_the_margin_or_the_noise_is_not_promoted(
    store: Store, name: str, models: list[Logged], promote: Any, tmp_path: Path, clips: list[str], said: list[float]
) -> None:
    weak, strong = models
    promote(weak.run_id)
    code, decision = promote(strong.run_id, "--margin", "1.9")
    assert (code, decision["decision"]) == (3, "kept") and decision["difference"]["low"] > 0
    few = listed(tmp_path / "few.csv", [(clips[i], said[i] if i else 1.0, "a") for i in range(4)])
    code, decision = promote(strong.run_id, "--margin", "0", clips=few)
    assert decision["difference"]["low"] <= 0 and (code, decision["decision"]) == (3, "kept")
    assert aliases(store, name) == {"champion": "1"}


def test_a_dry_run_decides_and_changes_nothing(store: Store, name: str, models: list[Logged], promote: Any) -> None:
    code, decision = promote(models[0].run_id, "--dry-run")
    assert (code, decision["decision"], decision["dry_run"]) == (0, "promoted", True)
    assert not store.client.search_registered_models(f"name = '{name}'")
    promote(models[0].run_id)
    assert promote(models[1].run_id, "--dry-run")[1]["decision"] == "promoted"
    assert aliases(store, name) == {"champion": "1"}
    assert len(store.client.search_model_versions(f"name = '{name}'")) == 1
    assert store.client.list_artifacts(models[1].run_id) == []


def test_the_same_command_again_registers_nothing_twice(
    store: Store, name: str, models: list[Logged], promote: Any
) -> None:
    promote(models[1].run_id)
    first = promote(models[0].run_id)
    assert promote(models[0].run_id) == first
    code, again = promote(models[1].run_id)
    assert (code, again["decision"]) == (0, "unchanged") and "it is the champion already" in again["reason"]
    assert {v.version for v in store.client.search_model_versions(f"name = '{name}'")} == {1, 2}


def test_a_promotion_killed_between_the_aliases_is_finished_by_the_same_command(
    store: Store, name: str, models: list[Logged], promote: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(models[0].run_id)
    point = registry.Registry.point

    def killed(self: registry.Registry, name: str, alias: str, version: registry.Version) -> None:
        point(self, name, alias, version)
        raise KeyboardInterrupt

    monkeypatch.setattr(registry.Registry, "point", killed)
    assert promote(models[1].run_id)[0] == 130
    assert aliases(store, name) == {"champion": "1", "previous": "1"}
    assert "has no previous champion" in promote(None, "--rollback")[1]
    monkeypatch.undo()
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert promote(models[1].run_id)[1]["decision"] == "promoted"
    assert aliases(store, name) == {"champion": "2", "previous": "1"}


def test_the_best_of_a_run_is_its_finished_child_with_the_lowest_error(
    store: Store, checkpoints: list[str], promote: Any
) -> None:
    parent = store.run()
    good, fair = (store.run(parent, best_val_mse=mse) for mse in (0.2, 0.3))
    store.run(parent, "FAILED", best_val_mse=0.1)
    store.run(parent, best_val_mse=float("nan"))
    store.run(parent)
    store.run(best_val_mse=0.05)  # another parent's
    for run in (good, fair):
        log_student(checkpoints[0], run, store.uri)
    code, decision = promote(f"best-of:{parent}")
    assert (code, decision["candidate"]["run_id"]) == (0, good)
    code, error = promote(f"best-of:{good}")
    assert code == 1 and f"run {good}" in error and "none of its 0 finished child runs has a best_val_mse" in error


def test_the_folder_of_a_run_stands_for_its_best_student(
    store: Store, checkpoints: list[str], promote: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = store.run()
    good, other = (store.run(parent, best_val_mse=mse) for mse in (0.2, 0.3))
    for run in (good, other):
        log_student(checkpoints[0], run, store.uri)
    folders = {f"{tmp_path}/students": parent, f"{tmp_path}/students/v1": other}
    monkeypatch.setattr(promote_command, "run_id", folders.get)
    for folder, expected in zip(folders, (good, other), strict=True):
        code, decision = promote(folder, "--dry-run")
        assert (code, decision["candidate"]["run_id"]) == (0, expected)
    code, error = promote(f"{tmp_path}/nothing")
    assert code == 1 and "nothing is not the folder of a run in MLflow; give the OUT folder of train-students" in error


def test_a_clip_without_a_score_is_reported_and_counts_for_neither(
    store: Store, name: str, models: list[Logged], promote: Any, tmp_path: Path, clips: list[str], said: list[float]
) -> None:
    promote(models[0].run_id)
    soundfile.write(tmp_path / "silent.wav", np.zeros(RATE), RATE)
    rows = [(path, mos, "a") for path, mos in zip(clips, said, strict=True)]
    whole = listed(tmp_path / "whole.csv", rows)
    (tmp_path / "alone.wav").write_bytes(Path(clips[0]).read_bytes())
    alone = [(str(tmp_path / "silent.wav"), 5.0, "a"), (str(tmp_path / "alone.wav"), 4.0, "alone")]
    more = listed(tmp_path / "more.csv", [*rows, *alone])
    _, expected = promote(models[1].run_id, "--dry-run", clips=whole)
    _, decision = promote(models[1].run_id, "--dry-run", clips=more)
    assert decision["clips"]["scored"] == 41
    assert decision["clips"]["excluded"] == [
        {"uri": str(tmp_path / "silent.wav"), "reason": "silent (peak below -80 dBFS)"}
    ]
    assert decision["datasets"][1] == {"dataset": "alone", "clips": 1, "candidate": None, "champion": None}
    assert decision["difference"] == expected["difference"]


def test_only_clips_that_trained_no_student_are_used(
    store: Store, name: str, models: list[Logged], promote: Any, tmp_path: Path, clips: list[str], said: list[float]
) -> None:
    def used(splits: list[str]) -> Any:
        rows: Any = [(path, mos, "a", split) for path, mos, split in zip(clips, said, splits, strict=True)]
        code, decision = promote(models[0].run_id, "--dry-run", clips=listed(tmp_path / "splits.csv", rows, "split"))
        return decision["clips"]["scored"] if code == 0 else decision

    assert used(["train"] * 30 + ["validation"] * 6 + ["test"] * 4) == 4
    assert used(["train"] * 30 + [""] * 10) == 10
    assert "all of split train" in used(["train"] * 40)


def test_a_clip_that_trained_a_model_is_left_out_and_one_that_chose_it_is_counted(
    store: Store, name: str, models: list[Logged], promote: Any, source: str, checkpoints: list[str], tmp_path: Path
) -> None:
    promote(models[0].run_id)
    rows = scored_clips.manifest(source)
    known = {checkpoint.CLIPS: heard.record(rows.slice(0, 12), rows.slice(12, 6))}
    save_student(load_student(checkpoints[1]).network, str(tmp_path / "trained"), known)
    run = log_student(str(tmp_path / "trained"), store.run(), store.uri).run_id
    code, decision = promote(run, "--dry-run")
    assert (code, decision["clips"]["scored"], decision["clips"]["selected_on"]) == (
        0,
        28,
        {"candidate": 6, "champion": 0},
    )
    assert {row["reason"] for row in decision["clips"]["excluded"]} == {"the candidate was trained on it"}
    known = {checkpoint.CLIPS: heard.record(rows, None)}
    save_student(load_student(checkpoints[1]).network, str(tmp_path / "all"), known)
    code, error = promote(log_student(str(tmp_path / "all"), store.run(), store.uri).run_id, "--dry-run")
    assert (
        code == 1 and "0 clips were scored, 40 could not be, the first because the candidate was trained on it" in error
    )


def test_what_cannot_be_decided_is_an_error_that_says_what_to_do(
    store: Store,
    name: str,
    models: list[Logged],
    promote: Any,
    tmp_path: Path,
    clips: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, empty = models[0].run_id, store.run()
    flat = listed(tmp_path / "flat.csv", [(path, 3.0, "a") for path in clips[:5]])
    for arguments, reason in (
        ((empty,), f"run {empty} has logged no student; give a run that training has ended"),
        (("00",), "run 00: MLflow at sqlite"),
        ((None, "--rollback"), f"no model '{name}' is registered at sqlite"),
    ):
        code, error = promote(*arguments)
        assert code == 1 and reason in error, (arguments, error)
    for arguments, reason in (
        ((run, "--margin", "-1"), "--margin is -1.0; it must be"),
        ((run, "--resamples", "10"), "--resamples is 10"),
        ((None,), "give --run, the MLflow run of the student, and --eval"),
        ((run, "--rollback"), "leave out --run"),
    ):
        code, error = promote(*arguments)
        assert code == 2 and reason in error, (arguments, error)
    code, error = promote(run, clips=flat)
    assert (
        code == 1 and "no dataset has 3 scored clips with different mos (5 clips were scored, 0 could not be)" in error
    )
    code, error = promote(run, clips=str(tmp_path / "nowhere.parquet"))
    assert code == 1 and "no such file" in error
    assert not store.client.search_registered_models(f"name = '{name}'")
    assert cli.main(["promote", "--run", run, "--eval", flat]) == 1  # neither --tracking nor MLFLOW_TRACKING_URI


def test_a_storage_outage_is_not_decided_around(
    models: list[Logged], promote: Any, monkeypatch: pytest.MonkeyPatch, clips: list[str]
) -> None:
    load = audio.load

    def refuse(path: str) -> np.ndarray:
        if path == clips[7]:
            raise UnreadableError(path, "cannot be read (TimeoutError: x)", "check the connection")
        return load(path)

    monkeypatch.setattr(audio, "load", refuse)
    code, error = promote(models[0].run_id)
    assert code == 1 and "TimeoutError" in error


def test_the_champion_scores_by_the_folder_of_its_runs(
    models: list[Logged], promote: Any, name: str, out: Path, checkpoints: list[str], clips: list[str], tmp_path: Path
) -> None:
    promote(models[1].run_id)
    command = ["score", clips[3], "--out", str(tmp_path / "scores.json")]
    assert cli.main([*command, "--model", f"models:/{name}@champion", "--tracking", str(out)]) == 0
    (row,) = json.loads((tmp_path / "scores.json").read_text())
    assert row["mos"] == speechdistill.load(checkpoints[1])(audio.load(clips[3]), RATE)


@pytest.mark.slow  # another server; the registry is the same, and test_run.py has one
def test_a_promotion_through_a_server(
    checkpoints: list[str], source: str, clips: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracking_server(tmp_path) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        there, at = Store(url), ["--model-name", "quality", "--eval", source]
        runs = [log_student(checkpoint, there.run()).run_id for checkpoint in checkpoints]
        assert [cli.main(["promote", "--run", run, *at]) for run in (*runs, *runs)] == [0, 0, 3, 0]
        assert aliases(there, "quality") == {"champion": "2", "previous": "1"}
        secret = url.replace("//", "//user:secret@")
        with pytest.raises(RegistryError) as error, student_folder("models:/quality@second", secret):
            pass
        assert "at http://127" in str(error.value) and "secret" not in str(error.value)
        champion = speechdistill.load("models:/quality@champion")
        assert champion(audio.load(clips[0]), RATE) == speechdistill.load(checkpoints[1])(audio.load(clips[0]), RATE)
        assert not [path for path in Path.cwd().iterdir() if path.name.startswith(("mlruns", "mlflow.db"))]
