"""Comparing models: every model hears every clip once, whatever is killed, added or broken; and the tables say so."""

import csv
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

from comparisons import RATE, asked, compared, label_run, recordings, without_ray
from configs import changed, config_of
from manifests import voice
from mlflow_runs import student
from small_models import speech_encoder
from speechdistill import cli
from speechdistill.commands import compare, prune
from speechdistill.commands.compare import Compare
from speechdistill.commands.prune import Prune
from speechdistill.commands.resampling import Bootstrap
from speechdistill.comparing import candidates, comparison, judged, page, scoring, tables
from speechdistill.data import heard, scored_clips
from speechdistill.data.label_scale import Scale
from speechdistill.engine import flow, held_out
from speechdistill.engine.finished_run import LabelRun
from speechdistill.io import audio, checkpoint, storage, table
from speechdistill.io.errors import RunError, TableError
from speechdistill.io.options import OptionError
from speechdistill.models.encoder_scorer import HEAD, TrainedHead
from speechdistill.models.label import Label, Unscorable
from speechdistill.models.load import load_teacher
from speechdistill.models.networks.conv_transformer import QualityHead
from speechdistill.models.networks.speech_encoder import load as load_encoder
from speechdistill.models.options import TeacherOptions
from speechdistill.models.student import load_student, save_student
from speechdistill.training.recipe import Around

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("students")
    return [student(folder / str(seed), seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def said(out: Path) -> Counter[tuple[str, str]]:
    """How often each model has scored each content, over all that is committed."""
    found: Counter[tuple[str, str]] = Counter()
    for file in out.glob("scores/*/shards/*.parquet"):
        for row in pq.read_table(file).to_pylist():
            found.update((key, row["clip_sha256"]) for key in json.loads(row["scores"]))
    return found


@pytest.mark.slow  # the demo compares on Ray, and one goes on without Ray below
def test_a_stopped_comparison_goes_on_with_the_same_run_on_ray(
    tmp_path: Path, students: list[str], local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = recordings(tmp_path / "clips", 24), tmp_path / "out"
    config = Compare(clips=source, out=str(out), models=f"a={students[0]},b={students[1]}")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("speechdistill.engine.flow.run", partial(without_ray, stop_after=2))
        compare.run(config)
    kept = {file: file.stat().st_mtime_ns for file in out.glob("scores/*/shards/*")}
    assert len(said(out)) == 2 * 2 * 3 and not (out / "summary.json").exists()
    found = compare.run(config)
    assert said(out) == {(model.key, clip.sha256): 1 for model in found.models for clip in found.clips}
    assert len(list(out.glob("scores/*"))) == 1, "it is another run"
    assert kept.items() <= {file: file.stat().st_mtime_ns for file in out.glob("scores/*/shards/*")}.items()
    rows = table.read(f"{out}/scores.parquet", "score.v1").to_pylist()
    assert Counter(row["model"] for row in rows) == {"a": 24, "b": 24}
    assert set(storage.read_json(f"{out}/summary.json")["models"]) == {"a", "b"}


@pytest.mark.slow
def test_a_killed_comparison_resumes_and_a_further_model_is_all_that_would_be_scored(
    tmp_path: Path, students: list[str], local_ray: None
) -> None:
    source, out = recordings(tmp_path / "clips", 160), tmp_path / "out"
    options = ["--clips", source, "--out", str(out), "--models", f"a={students[0]},b={students[1]}"]
    driver = subprocess.Popen([sys.executable, str(ROOT / "jobs" / "compare.py"), *options], start_new_session=True)
    while not list(out.glob("scores/*/shards/part-*")):
        with suppress(subprocess.TimeoutExpired):
            driver.wait(timeout=0.02)
            break
    its_workers = [p for p in psutil.Process(driver.pid).children(recursive=True) if "Agent" not in p.name()]
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert not psutil.wait_procs(its_workers, timeout=60)[1]
    before = said(out)
    assert 0 < len(before) < 320 and not (out / "summary.json").exists()
    kept = {file: file.stat().st_mtime_ns for file in out.glob("scores/*/shards/*")}

    (tmp_path / "clips" / "0.wav").write_bytes(b"RIFF this is no audio")
    config = Compare(clips=source, out=str(out), models=f"a={students[0]},b={students[1]}")
    found = compare.run(config)
    clips = {clip.sha256 for clip in found.clips}
    assert before.keys() <= said(out).keys() and set(said(out).values()) == {1}, "a clip was scored twice"
    wanted = {(model.key, clip) for model in found.models for clip in clips}
    broken = {(model.key, found.clips[0].sha256) for model in found.models}
    assert wanted - said(out).keys() == broken, "a clip is missing"
    assert kept.items() <= {file: file.stat().st_mtime_ns for file in out.glob("scores/*/shards/*")}.items()
    assert found.by_clip.clips == {"pub": 79, "tub": 80}
    ((reason, count),) = found.left_out["pub"].items()
    assert "not audio" in reason and count == 1

    rows = table.read(f"{out}/scores.parquet", "score.v1").to_pylist()
    assert Counter(row["model"] for row in rows) == {"a": 160, "b": 160}
    assert [row["error"] is not None for row in rows] == [row["uri"].endswith("/0.wav") for row in rows]
    summary = storage.read_json(f"{out}/summary.json")
    assert summary["left_out"] == {"pub": {reason: 1}} and set(summary["models"]) == {"a", "b"}

    more = candidates.load(candidates.listed(f"{config.models},c={students[2]}"), str(out), {})
    tasks = scoring.missing(more, found.clips, scoring.committed(str(out)))
    keys = [model.key for model in more]
    assert Counter(task.models for task in tasks) == {(keys[2],): 159, tuple(keys): 1}


def test_a_worker_that_outlives_its_driver_scores_nothing_twice(
    tmp_path: Path, students: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    clips = judged.clips(recordings(tmp_path / "clips", 24)).clips
    a, b = candidates.load({"a": students[0], "b": students[1]}, str(out), {})
    runs: list[flow.Flow] = []

    def stopped(run: flow.Flow) -> None:
        runs.append(run)
        without_ray(run, stop_after=2)

    def late(run: flow.Flow) -> None:
        with suppress(KeyboardInterrupt):
            without_ray(runs[0], stop_after=1)  # the next part, after the second driver has listed what is missing
        without_ray(run)

    monkeypatch.setattr("speechdistill.engine.flow.run", stopped)
    with pytest.raises(KeyboardInterrupt):
        scoring.score([a], clips, str(out))
    monkeypatch.setattr("speechdistill.engine.flow.run", late)
    scoring.score([a, b], clips, str(out))
    assert said(out) == {(model.key, clip.sha256): 1 for model in (a, b) for clip in clips}


def test_a_stopped_run_of_what_is_no_longer_wanted_is_let_be(
    tmp_path: Path, students: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    clips = judged.clips(recordings(tmp_path / "clips", 24)).clips
    a, b = candidates.load({"a": students[0], "b": students[1]}, str(out), {})
    monkeypatch.setattr("speechdistill.engine.flow.run", partial(without_ray, stop_after=2))
    with pytest.raises(KeyboardInterrupt):
        scoring.score([a, b], clips, str(out))
    monkeypatch.setattr("speechdistill.engine.flow.run", without_ray)
    scoring.score([a], clips[:12], str(out))
    assert set(said(out).values()) == {1} and len(said(out)) == 2 * 6 + 6
    scoring.score([a, b], clips, str(out))
    assert said(out) == {(model.key, clip.sha256): 1 for model in (a, b) for clip in clips}


def test_rejects_are_judged_among_all_files_whenever_they_are_tried_again(
    tmp_path: Path, students: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = recordings(tmp_path / "clips", 24), tmp_path / "out"
    (tmp_path / "clips" / "0.wav").write_bytes(b"RIFF this is no audio")
    entries, clips = candidates.load({"a": students[0]}, str(out), {}), judged.clips(source).clips
    monkeypatch.setattr("speechdistill.engine.flow.run", without_ray)
    for _ in range(2):  # the second time the broken file is all there is to do
        found = scoring.score(entries, clips, str(out))
        assert len(found.scores) == 23 and list(found.rejects) == [clips[0].uri]
    for i in range(1, 4):
        (tmp_path / "clips" / f"{i}.wav").write_bytes(b"RIFF nor is this")
    with pytest.raises(RunError, match="2 of 22 samples were rejected"):  # files of equal bytes are one
        scoring.score(entries, judged.clips(source).clips, str(out), max_reject_share=0.05)


def test_what_is_scored_needs_no_cluster_and_is_what_the_score_command_says(
    tmp_path: Path, students: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    source, out = recordings(tmp_path / "clips", 12), tmp_path / "out"
    wanted = f"a={students[0]},tub-expert={students[1]}"
    with monkeypatch.context() as patch:
        patch.setattr("speechdistill.engine.flow.run", without_ray)
        scoring.score(candidates.load(candidates.listed(wanted), str(out), {}), judged.clips(source).clips, str(out))
    monkeypatch.setattr("speechdistill.engine.flow.run", lambda flow: pytest.fail("there was something to score"))
    assert cli.main(["compare", "--clips", source, "--out", str(out), "--models", wanted, "--paper"]) == 0
    printed = capsys.readouterr().out
    assert "tub-expert" in printed and "beside the paper's Table I" in printed and "metrics.csv" in printed
    with (out / "table.csv").open() as file:
        header, clips, first, second = csv.reader(file)
    assert header == ["model", "parameters", "CPU ms/s", "pub", "tub", "weighted", "unweighted"]
    assert clips[3:5] == ["6", "6"] and first[0] == "a" and second[0] == "tub-expert"
    rows = [row for row in table.read(f"{out}/scores.parquet", "score.v1").to_pylist() if row["model"] == "a"]
    assert cli.main(["score", *(row["uri"] for row in rows), "--model", students[0], "--out", f"{out}/s.json"]) == 0
    said = [row["mos"] for row in storage.read_json(f"{out}/s.json")]
    assert said == pytest.approx([row["score"] for row in rows], abs=1e-6)
    client = MlflowClient(tracking_uri=f"sqlite:///{out}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("compare").experiment_id])
    assert run.info.status == "FINISHED" and "tub-expert/pcc_weighted" in run.data.metrics
    assert {"table.md", "summary.json"} <= {file.path for file in client.list_artifacts(run.info.run_id)}


def test_a_clip_that_changes_is_scored_anew_and_a_copy_is_not(tmp_path: Path, students: list[str]) -> None:
    source = recordings(tmp_path / "clips", 6)
    entries = candidates.load({"a": students[0]}, str(tmp_path), {})
    known = asked(entries, judged.clips(source).clips).scores
    assert scoring.missing(entries, judged.clips(source).clips, known) == []
    shutil.copy(tmp_path / "clips" / "1.wav", tmp_path / "clips" / "0.wav")
    assert scoring.missing(entries, judged.clips(source).clips, known) == []
    assert len(scoring.missing(entries, judged.clips(source).clips, {})) == 5
    soundfile.write(tmp_path / "clips" / "0.wav", voice(1.0, seed=77), RATE)
    (task,) = scoring.missing(entries, judged.clips(source).clips, known)
    assert task.uri.endswith("/0.wav") and task.models == (entries[0].key,)


def test_a_clip_is_decoded_once_for_all_models(
    tmp_path: Path, students: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    load = audio.load
    monkeypatch.setattr(audio, "load", lambda uri: (loads.append(uri), load(uri))[1])
    found = compared(recordings(tmp_path / "clips", 6), f"{students[0]},{students[1]},distillmos", tmp_path)
    assert len(loads) == len(set(loads)) == 6 and all(np.isfinite(scores).all() for scores in found.scores.values())


def test_what_a_model_cannot_judge_is_an_answer(tmp_path: Path, students: list[str]) -> None:
    source = recordings(tmp_path / "clips", 8, datasets=("one",))
    soundfile.write(tmp_path / "clips" / "3.wav", np.zeros(RATE), RATE)
    found = compared(source, students[0], tmp_path)
    assert found.left_out["one"] == {"silent (peak below -80 dBFS)": 1} and found.by_clip.clips == {"one": 7}
    assert tables.left_out(found) == ["one: 1 × silent (peak below -80 dBFS)"]
    many = replace(found, left_out={"one": Counter({f"{i}.wav is broken": 9 - i for i in range(9)})})
    assert tables.left_out(many)[4:] == [
        "one: 5 × 4.wav is broken",
        "one: 4 further reasons; see scores.parquet",
    ]
    clips = judged.clips(source).clips
    assert scoring.missing(found.models, clips, asked(found.models, clips).scores) == []
    assert scoring._answer(Label(float("nan"), 0, None))["error"] == "the model's score is NaN or infinite"
    assert scoring._answer(Unscorable("no samples")) == {"score": None, "error": "no samples"}


def test_a_comparison_of_nothing_is_an_error_with_the_reason(
    tmp_path: Path, students: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("speechdistill.engine.flow.run", without_ray)
    source, out = recordings(tmp_path / "clips", 3), tmp_path / "out"
    for file in (tmp_path / "clips").glob("*.wav"):
        soundfile.write(file, np.zeros(RATE + int(file.stem)), RATE)
    with pytest.raises(RunError, match="no clip has a score of every model; the first because silent"):
        compare.run(Compare(clips=source, out=str(out), models=f"a={students[0]}"))
    assert not (out / "summary.json").exists()


def test_held_out_samples_of_a_label_run_have_their_plans_and_the_teachers_scores(
    tmp_path: Path, students: list[str]
) -> None:
    run = label_run(tmp_path, students[0])
    clips = judged.clips(run)
    assert clips.judge == "the teacher student" and len(clips.clips) == 4  # all of one of the six speakers
    assert {clip.dataset for clip in clips.clips} == {"weights_free"}
    assert all(json.loads(clip.plan or "")["sample_id"] == int(clip.clip_id) for clip in clips.clips)
    found = compared(run, f"a={students[0]},b={students[1]},c={students[2]}", tmp_path)
    assert found.scores["a"] == pytest.approx([clip.mos for clip in clips.clips], abs=1e-5)
    assert found.pcc("a", "weights_free").value == pytest.approx(1)
    assert found.best(None) in (None, "b", "c"), "the judge is not the best of all"
    assert [model.series for model in found.models] == ["teacher", "distilled", "distilled"]
    Path(run, "summary.json").unlink()
    for place, message in (
        (run, "not a complete label run"),
        (str(tmp_path), "is a folder; "),
        (f"{tmp_path}/none.csv", "none.csv: no such list"),
    ):
        with pytest.raises(TableError, match=message):
            judged.clips(place)


def test_models_that_know_the_clips_from_their_training_are_marked(
    tmp_path: Path, students: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(page, "worst", lambda found: [])  # whose spectrograms take seconds
    source = recordings(tmp_path / "clips", 9, datasets=("pub",))
    rows = scored_clips.manifest(source)
    known = {checkpoint.CLIPS: heard.record(rows.slice(0, 5), rows.slice(5, 2))}
    trained = known_from(tmp_path / "trained", students[0], known)
    further = known_from(tmp_path / "further", students[1], {"init": known})
    found = compared(source, f"trained={trained},further={further},new={students[2]}", tmp_path)
    both = {heard.TRAINED: 5, heard.SELECTED: 2}
    assert found.heard == {"trained": both, "further": both} and found.best(None) in (None, "new")
    line = "trained was trained on 5 of the 9 clips: its figures are too good"
    assert line in tables.markdown(found) and line in page.html(found, {})
    assert compare._summary(found)["heard"]["further"] == both


def test_samples_that_may_have_trained_a_student_are_marked(tmp_path: Path, students: list[str]) -> None:
    run = LabelRun(label_run(tmp_path, students[0]))
    clips = judged.clips(run.out)
    about = held_out.about(run, *held_out.held_out([run]))
    test = about["held_out"]["test"]
    fewer = {**about, "held_out": {"test": {**test, "hash_up_to": test["hash_up_to"] - 1}}}
    for shards, marked in (
        ([about], 0),
        ([{"fingerprint": "other"}, {**about, "fingerprint": "another seed"}], 0),
        ([{"fingerprint": run.fingerprint, "weight": 1.0}], 4),  # by an earlier version
        ([{**about, "held_out": {"too_few": "3 clips"}}], 4),
        ([fewer], 4),
        ({"labels/manifest.parquet": "5e1f"}, 0),
    ):
        assert clips.known_to({"shards": []} | {"init": {"shards": shards}})[heard.TRAINED] == marked, shards


def known_from(folder: Path, student: str, provenance: dict[str, Any]) -> str:
    """The student with another provenance."""
    save_student(load_student(student).network, str(folder), provenance)
    return str(folder)


def test_all_models_that_cannot_be_loaded_are_told_before_the_work(tmp_path: Path) -> None:
    source = recordings(tmp_path / "clips", 3)
    config = Compare(clips=source, out=str(tmp_path / "out"), models="distillmos,dnsmos_9,x=models:/nothing@champion")
    with pytest.raises(ValueError, match=r"(?s)2 of 3 models cannot be loaded:.*dnsmos_9: .*choose from.*x: no MLflow"):
        compare.run(config)
    assert not (tmp_path / "out" / "scores").exists()
    with pytest.raises(ValueError, match="'distillmos' twice"):
        compare.run(replace(config, models="distillmos,distillmos"))
    with pytest.raises(ValueError, match="distillmos and again are the same model"):
        compare.run(replace(config, models="distillmos,again=distillmos"))
    with pytest.raises(ValueError, match=r"--weights names \['y'\]"):
        compare.run(replace(config, weights={"y": "file"}))
    with pytest.raises(ValueError, match="--head file is for xlsr"):
        compare.run(replace(config, models="distillmos", head="file"))
    with pytest.raises(OptionError, match="--resamples is 5"):
        replace(config, bootstrap=Bootstrap(resamples=5))


def test_models_have_names_sizes_and_places_in_figure_3(tmp_path: Path, students: list[str]) -> None:
    assert candidates.listed("distillmos, v0=models:/a@champion,s3://b/x=y") == {
        "distillmos": "distillmos",
        "v0": "models:/a@champion",
        "s3://b/x=y": "s3://b/x=y",
    }
    small, v7 = candidates.load({"small": students[0], "v7": "distillmos"}, str(tmp_path), {})
    assert (v7.parameters, v7.series) == (4_133_226, "distilled, released") and v7.key != small.key
    assert small.series == "distilled" and 1_000 < (small.parameters or 0) < 10_000
    place = speech_encoder(tmp_path / "encoder", "wav2vec2", large=True)
    head = TrainedHead(place, load_encoder(place, 2).digest, 2, Scale())
    head.save(QualityHead(16, *HEAD), f"{tmp_path}/head", {})
    moved = str((tmp_path / "encoder").rename(tmp_path / "moved"))
    (teacher,) = candidates.load({"head": f"{tmp_path}/head"}, str(tmp_path), {"head": moved})
    assert (teacher.series, teacher.weights) == ("teacher", moved)
    alone = sum(p.numel() for p in QualityHead(16, *HEAD).parameters())
    assert teacher.parameters == alone + sum(p.numel() for p in load_encoder(moved, 2).encoder.parameters())
    shutil.rmtree(tmp_path / "models", ignore_errors=True)
    assert candidates._series({"shards": []}) == "labeled only"
    assert candidates._series({}) == "of unknown training"
    assert candidates._series({"shards": [], "init": {"shards": [1]}}) == "distilled", "it was fine-tuned from one"


@pytest.mark.parametrize("criterion", ["magnitude", "structured"])
def test_a_pruned_teacher_is_known_by_what_is_left_of_it(criterion: Any, tmp_path: Path) -> None:
    encoder = speech_encoder(tmp_path / "encoder", "wav2vec2", large=True)
    head = TrainedHead(encoder, load_encoder(encoder, 3).digest, 3, Scale())
    head.save(QualityHead(16, *HEAD), f"{tmp_path}/teacher", {})
    config = config_of(
        Prune,
        model=f"{tmp_path}/teacher",
        labeled=recordings(tmp_path / "clips", 20),
        out=str(tmp_path),
        criterion=criterion,
    )
    recipe = prune._recipe(changed(config, share=0.5, until=0.5))[0].make()
    network = recipe.network()
    around = Around(0, network, companions := recipe.companions(network))
    pruner: Any = companions["pruner"]
    network(torch.randn(2, 8000)).sum().backward()
    pruner.after_backward()
    recipe.save(around, f"{tmp_path}/before", {})
    pruner.prune()
    recipe.save(around, f"{tmp_path}/after", {})
    folders = {name: f"{tmp_path}/{name}" for name in ("teacher", "before", "after")}
    teacher, before, after = candidates.load(folders, str(tmp_path / "out"), {})
    assert [model.series for model in (teacher, before, after)] == ["teacher", *[f"pruned ({criterion})"] * 2]
    encoders = sum(p.numel() for p in network.encoder.parameters())
    assert 0.3 < ((before.parameters or 0) - (after.parameters or 0)) / encoders < 0.7
    for name in ("before", "after"):
        storage.publish_json({"step": 0, "remaining": 1.0, "mse": 0.5}, f"{tmp_path}/{name}/figures.json")
    kept = prune._kept(str(tmp_path), ["before", "after"])
    assert kept[0].parameters == teacher.parameters == sum(p.numel() for p in network.parameters())
    assert [one.nonzero for one in kept] == [before.parameters, after.parameters]
    (there,) = load_teacher(after.teacher, TeacherOptions(device="cpu")).label([voice(1.0)])
    (here,) = load_teacher(folders["after"], TeacherOptions(device="cpu")).label([voice(1.0)])
    assert there == here, "what workers load is not what was given"


def test_an_ensemble_is_one_model_and_what_needs_a_clean_original_is_none(tmp_path: Path, students: list[str]) -> None:
    ensemble = f"ensemble:{students[0]}=0.7,{students[1]}=0.3"
    wanted = candidates.listed(f"mix={ensemble},b={students[1]},{ensemble}, dnsmos_p808")
    assert wanted == {"mix": ensemble, "b": students[1], ensemble: ensemble, "dnsmos_p808": "dnsmos_p808"}
    (mix,) = candidates.load({"mix": ensemble}, str(tmp_path), {})
    assert (mix.series, mix.parameters) == ("baseline", None)
    with pytest.raises(ValueError, match="pesq_oracle compares with clean originals"):
        candidates.load({"pesq_oracle": "pesq_oracle"}, str(tmp_path), {})


def test_heads_with_other_scales_are_two_models(tmp_path: Path) -> None:
    encoder = speech_encoder(tmp_path / "encoder", "wav2vec2", large=True)
    network = QualityHead(16, *HEAD)
    for name, scale in (("plain", Scale()), ("scaled", Scale(1.5, 0.5))):
        TrainedHead(encoder, load_encoder(encoder, 3).digest, 3, scale).save(network, f"{tmp_path}/{name}", {})
    both = candidates.load({name: f"{tmp_path}/{name}" for name in ("plain", "scaled")}, str(tmp_path / "out"), {})
    one, other = (load_teacher(model.teacher, TeacherOptions(device="cpu")) for model in both)
    assert [one.weights_hash, other.weights_hash] == [model.sha256 for model in both]
    assert one.label([voice(1.0)]) != other.label([voice(1.0)])


def test_tables_say_what_is_missing_and_what_is_more_than_chance(tmp_path: Path, students: list[str]) -> None:
    clips = [
        judged.JudgedClip(str(i), f"{i}.wav", f"{i}", "tub" if i < 30 else "flat|", None, 1 + i % 5) for i in range(34)
    ]
    clips[30:] = [clip._replace(mos=3.0) for clip in clips[30:]]
    (good,) = candidates.load({"distillmos": students[0]}, str(tmp_path), {})
    bad = good._replace(name="bad", sha256="another")
    rng = np.random.default_rng(0)
    given = {good.key: [clip.mos for clip in clips], bad.key: rng.uniform(1, 5, 34).tolist()}
    scores = {
        (key, clip.sha256): scoring.Score(score, None, 2.0, 0.1)
        for key, column in given.items()
        for clip, score in zip(clips, column, strict=True)
    }
    of_listeners = judged.Judged("list.csv", clips, "listeners")
    found = comparison.compared(of_listeners, [good, bad], scoring.Scores(scores, {}), 100, 0, {})
    text = tables.markdown(found)
    assert "| distillmos | 2 k | 50.0 | – | 1.00 | 1.00 | 1.00 |" in text and r"flat\|" in text
    assert "- flat|: the listeners' scores are all the same" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| distillmos | bad |")]
    assert line.endswith("| yes |")
    assert [found.best("tub"), found.best(None), found.best(None, plain=True)] == ["distillmos"] * 3
    beside = tables.beside_paper(found)
    assert beside[0] == ["model", "", "tub", "weighted", "unweighted"]
    assert beside[1:4] == [
        ["distillmos", "ours", "1.00", "1.00", "1.00"],
        ["distillmos_v7", "paper", "0.76", "0.76", "0.76"],
        ["", "difference", "+0.24", "+0.24", "+0.24"],
    ]
    assert tables.gaps(found) == ["flat|: the listeners' scores are all the same"]
    rows = tables.long(found)
    assert ["system", "weighted mean", 0, "bad", "pcc", None, None, None, "no dataset has this figure"] in rows
    assert len(rows) == 1 + 2 * 7 * (2 + 2) + 2 * 7 * 2


def test_means_are_of_the_same_datasets_wherever_two_are_compared(tmp_path: Path, students: list[str]) -> None:
    names = ("tub", "dns_3_fb")
    clips = [judged.JudgedClip(str(i), f"{i}.wav", f"{i}", names[i // 20], None, 1 + i % 5) for i in range(40)]
    (good,) = candidates.load({"squim": students[0]}, str(tmp_path), {})
    flat = good._replace(name="flat", sha256="flat")  # says the same of every clip of dns_3_fb
    half = good._replace(name="half", sha256="half")  # can judge none of dns_3_fb
    other = good._replace(name="other", sha256="other")  # and this none of tub
    rng = np.random.default_rng(0)
    scores = {}
    for i, clip in enumerate(clips):
        said = {"squim": clip.mos + 0.3 * rng.standard_normal(), "flat": clip.mos if i < 20 else 3.0}
        said |= {"half": clip.mos} if i < 20 else {"other": clip.mos}
        for model in (good, flat, half, other):
            score = said.get(model.name)
            scores[model.key, clip.sha256] = scoring.Score(score, None if score else "too long", 2.0, 0.1)
    entries = [good, flat, half, other]
    found = comparison.compared(judged.Judged("x", clips, "listeners"), entries, scoring.Scores(scores, {}), 100, 0, {})
    assert found.counts.all() and found.whole == ["squim"] and found.differences == {}
    assert found.best("tub") is None and found.best(None) is None
    assert tables.gaps(found) == [
        "dns_3_fb: the model could score none of its clips (half)",
        "dns_3_fb: the model's scores are all the same (flat)",
        "tub: the model could score none of its clips (other)",
    ]
    header, ours, theirs, difference = tables.beside_paper(found)
    assert header[2:] == ["dns_3_fb", "tub", "weighted", "unweighted"]
    assert theirs[2:] == ["–", "0.69", "0.69", "0.69"] and ours[3] == ours[4] == ours[5] != ours[2]
    assert difference[2] == "–" and difference[4] == difference[3]
