"""The main job end to end: real degradation, the real teacher, real shards, real kills."""

import json
import math
import os
import signal
import struct
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import manifests
from comparisons import without_ray
from configs import changed, config_of, prepared
from label_runs import rejects_of, rows_of
from manifests import corpus, voice
from speechdistill import cli
from speechdistill.commands import ingest, pseudolabel
from speechdistill.commands.ingest import Ingest
from speechdistill.commands.pseudolabel import Pseudolabel
from speechdistill.data.clips import Clips
from speechdistill.data.degradation_recipes import as_is, weights_free
from speechdistill.data.plan import Plan, Plans
from speechdistill.engine import flow, shards
from speechdistill.engine.limits import Limits
from speechdistill.engine.pools import Pools
from speechdistill.io import audio, storage, table
from speechdistill.io.errors import AudioError, RunError
from speechdistill.io.options import OptionError
from speechdistill.labelling import job, samples
from speechdistill.models.load import load_teacher
from speechdistill.models.model import Model
from speechdistill.tracking.run import run_id

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> str:
    root = corpus(tmp_path_factory.mktemp("corpus"))
    folders = {kind: (str(root / kind),) for kind in ("speech", "noise", "rir")}
    ingest.run(Ingest(out=str(root / "manifest"), **folders))
    return str(root / "manifest" / "clips.parquet")


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The job's own workers without Ray, for what the engine has no part in."""
    monkeypatch.setattr(flow, "run", without_ray)


def test_every_row_is_what_its_plan_says_and_scored_as_stored(clips: str, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    config = config_of(
        Pseudolabel, clips=clips, out=str(tmp_path), num_samples=10, seed=4, reference=True, rows_per_part=4
    )
    summary = pseudolabel.run(config)
    rows = rows_of(tmp_path)
    assert sorted(rows) == list(range(10))
    teacher = Model(load_teacher("distillmos"))
    for row in rows.values():
        sample = Plan.from_json(row["plan"])
        degraded, clean = samples.make_sample(sample)
        assert audio.encode(degraded, "flac") == row["audio"], "the stored audio is not its plan's"
        assert audio.encode(clean, "flac") == row["reference"]
        stored = audio.decode(row["audio"], row["audio_format"])
        assert len(stored) == row["num_samples"] == round(row["segment_duration_s"] * 16000)
        assert row["score"] == pytest.approx(teacher(stored, 16000), abs=1e-5)
        assert row["logit"] == pytest.approx(math.log((row["score"] - 1) / (5 - row["score"])), abs=1e-6)
        assert row["teacher_hash"] == teacher.teacher.weights_hash
        assert row["clip_ids"] == sample.clip_ids and row["clip_ids"][0] == sample.clip_id
    assert summary.to_json() == storage.read_json(f"{tmp_path}/summary.json")
    assert summary.complete and summary.wanted == 10
    (shared,) = tmp_path.glob("clips-*.v1.arrow")
    assert Plans(weights_free(), Clips.read(str(shared)), 4)[7] == Plan.from_json(rows[7]["plan"])
    assert (summary.labelled, sum(summary.score_histogram["counts"])) == (10, 10)
    assert summary.hours * 3600 * 16000 == pytest.approx(sum(row["num_samples"] for row in rows.values()))
    metrics = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db").get_run(str(run_id(str(tmp_path))))
    seen = metrics.data.metrics  # how far the run was
    assert (seen["done"], seen["rejected"], seen["queue/teach"], seen["queue/write"]) == (10, 0, 0, 0)
    assert seen["eta_s"] == 0 and seen["busy/teach"] > 0 and seen["audio_hours_per_s"] > 0


def test_the_clean_segment_reaches_a_teacher_that_compares_and_an_ensemble_with_one(
    clips: str, tmp_path: Path, in_process: None
) -> None:
    pytest.importorskip("pesq", reason="its installation needs a C compiler")
    config = config_of(
        Pseudolabel, clips=clips, out=f"{tmp_path}/pesq", num_samples=4, seed=4, rows_per_part=4, teacher="pesq_oracle"
    )
    assert pseudolabel.run(config).labelled == 4
    both = changed(config, out=f"{tmp_path}/both", teacher="ensemble:distillmos=3,pesq_oracle=1", reference=True)
    assert pseudolabel.run(both).labelled == 4
    pesq, mos = Model(load_teacher("pesq_oracle")), Model(load_teacher("distillmos"))
    compared, averaged = rows_of(tmp_path / "pesq"), rows_of(tmp_path / "both")
    for sample_id, row in compared.items():
        degraded, clean = samples.make_sample(Plan.from_json(row["plan"]))
        expected = np.array([mos(degraded, 16000), pesq(degraded, 16000, clean)])
        assert row["score"] == pytest.approx(expected[1], abs=1e-5)
        assert (row["teacher"], row["reference"]) == ("pesq_oracle", None)
        other = averaged[sample_id]
        assert other["score"] == pytest.approx(0.75 * expected[0] + 0.25 * expected[1], abs=1e-5)
        assert other["disagreement"] == pytest.approx(abs(expected[1] - expected[0]) * 0.1875**0.5, abs=1e-5)
        assert other["teacher"] == "ensemble:distillmos=0.75,pesq_oracle=0.25"
        assert other["audio"] == row["audio"] and other["reference"] == audio.encode(clean, "flac")


def test_mlflow_has_parameters_summary_and_picture(clips: str, tmp_path: Path, in_process: None) -> None:
    from mlflow import MlflowClient

    config = config_of(Pseudolabel, clips=clips, out=str(tmp_path), num_samples=2, rows_per_part=2)
    pseudolabel.run(config)
    pseudolabel.run(changed(config, num_samples=4))  # a resumed job goes on with its run
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("pseudolabel")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["recipe"] == "weights_free" and len(run.data.params["clips_sha256"]) == 64
    assert run.data.metrics["labelled"] == 4
    assert {file.path for file in client.list_artifacts(run.info.run_id)} == {"scores.png", "summary.json"}
    assert not (Path.cwd() / "mlruns").exists()


def test_a_path_that_is_no_manifest_is_told_from_one_that_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ingested = tmp_path / "ingested"
    ingested.mkdir()
    (ingested / "clips.parquet").touch()
    for command, more in (("pseudolabel", []), ("compare", ["--models", "dnsmos_p808"])):
        for source, reason in (
            (tmp_path / "nowhere", "no such file; check the path; `speechdistill ingest` writes the manifest"),
            (tmp_path, f"is a folder; run `speechdistill ingest --speech {tmp_path} --out OUT`, and give OUT/clips"),
            (ingested, f"is a folder; give {ingested}/clips.parquet"),
        ):
            assert cli.main([command, "--clips", str(source), *more, "--out", f"{tmp_path}/out"]) == 1
            assert f"error: {source}" in (told := capsys.readouterr().err) and reason in told


def test_a_grown_run_tells_which_samples_are_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(job: flow.Flow) -> None:
        raise RunError("no cluster", "here")

    clips = f"{tmp_path}/all.parquet"
    storage.publish(table.parquet_bytes(manifests.manifest()), clips)
    monkeypatch.setattr(flow, "run", fails)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    config = config_of(Pseudolabel, clips=clips, out=str(tmp_path), num_samples=100)
    with pytest.raises(RunError, match="no cluster"):
        pseudolabel.run(config)
    (tmp_path / "shards").mkdir()
    for name in ("part-00000000-00000064", "part-00000001-00000036"):
        (tmp_path / "shards" / f"{name}.parquet").touch()
    with pytest.raises(RunError, match="no cluster"):
        pseudolabel.run(changed(config, num_samples=200))
    (told,) = (text for text in caplog.messages if "labelled again" in text)
    assert told.startswith("samples 64 to 99 are labelled again: they share a file of 64 (--rows-per-part)")


@pytest.mark.slow  # the engine's part is in test_flow.py
def test_a_complete_run_is_left_as_it_is_and_a_grown_one_is_incomplete_until_it_ends(
    clips: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(Pseudolabel, clips=clips, out=str(tmp_path), num_samples=2, rows_per_part=2)
    pseudolabel.run(config)
    summary = (tmp_path / "summary.json").read_bytes()
    again = pseudolabel.run(config)
    assert (again.labelled, again.session_samples) == (2, 0)
    assert (tmp_path / "summary.json").read_bytes() == summary
    next((tmp_path / "shards").glob("*.parquet")).unlink()  # a damaged run is mended
    assert pseudolabel.run(config).labelled == 2 and len(rows_of(tmp_path)) == 2
    assert pseudolabel.run(changed(config, num_samples=1)).labelled == 2, "a smaller number lost what was there"

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("speechdistill.engine.pipeline.parts", stopped)
    with pytest.raises(KeyboardInterrupt):
        pseudolabel.run(changed(config, num_samples=4))
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    assert pseudolabel.run(changed(config, num_samples=4)).labelled == 4


@pytest.mark.slow  # outages are in test_run.py, without a run
def test_a_tracking_outage_does_not_stop_the_run(
    clips: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")  # the discard port: nobody listens
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    summary = pseudolabel.run(config_of(Pseudolabel, clips=clips, out=str(tmp_path), num_samples=2, rows_per_part=2))
    assert summary.labelled == 2
    assert [record.message for record in caplog.records if "the run continues" in record.message]


def test_a_dry_run_prints_what_the_run_takes_and_writes_nothing(
    clips: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pseudolabel", "--clips", clips, "--out", str(tmp_path / "run"), "--num-samples", "8"]
    assert cli.main([*command, "--dry-run", "--price", "cpu=0.05,gpu=2"]) == 0
    out = capsys.readouterr().out
    assert "8 samples take about" in out and "nothing was written" in out
    assert all(word in out for word in ("CPU", "GPU     0 s", "output", "money"))
    assert not (tmp_path / "run").exists()
    assert cli.main([*command, "--price", "cpu=0.05"]) == 2
    assert "add --dry-run" in capsys.readouterr().err


@pytest.mark.slow  # the engine's part is in test_flow.py
def test_a_run_whose_time_is_up_says_how_to_go_on(
    clips: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pseudolabel", "--clips", clips, "--out", str(tmp_path), "--num-samples", "4", "--rows-per-part", "2"]
    assert cli.main([*command, "--max-hours", "0"]) == 0
    assert "Reached --max-hours: 0 of 4 samples" in capsys.readouterr().out
    assert not (tmp_path / "summary.json").exists()
    assert cli.main(command) == 0
    assert "labelled 4 samples" in capsys.readouterr().out and (tmp_path / "summary.json").exists()


def test_a_node_with_other_libraries_is_refused_with_what_differs(clips: str) -> None:
    expected = {**samples.libraries(as_is()), "soxr": "0.0.1"}
    with pytest.raises(ValueError, match=r'soxr: "0.0.1" -> .*requirements.lock'):
        samples.Degrade(clips, as_is(), 0, "flac", False, expected)


def test_pools_can_be_sized_for_what_a_cluster_grows_to(tmp_path: Path) -> None:
    run = job.flow_of(prepared(weights_free()), str(tmp_path), Limits(), Pools(grow_to="cpu=80,gpu=4"))
    degrade, teach = run.stages(*run.grow_to)
    assert (teach.pool.actors, teach.pool.num_gpus) == (4, 1) and degrade.pool.actors == 78
    with pytest.raises(OptionError, match="--grow-to"):
        Pools(grow_to="80 CPUs")


def test_another_configuration_is_refused_with_what_differs(clips: str, tmp_path: Path, in_process: None) -> None:
    config = config_of(Pseudolabel, clips=clips, out=str(tmp_path), num_samples=2, rows_per_part=2)
    pseudolabel.run(config)
    with pytest.raises(RunError, match=r"(?s)seed: 0 -> 7.*another --out"):
        pseudolabel.run(changed(config, seed=7))
    with pytest.raises(RunError, match=r"recipe\.name: \"weights_free\" -> \"as_is\""):
        pseudolabel.run(changed(config, recipe="as_is"))
    with pytest.raises(ValueError, match="'weights_free' works without them"):
        pseudolabel.run(changed(config, recipe="paper"))


def test_as_is_labels_whole_files_in_segments(clips: str, tmp_path: Path, in_process: None) -> None:
    pseudolabel.run(
        config_of(Pseudolabel, clips=clips, out=str(tmp_path), recipe="as_is", segment_s=3.0, audio_format="pcm16")
    )
    covered: Counter[str] = Counter()
    for row in rows_of(tmp_path).values():
        sample = Plan.from_json(row["plan"])
        whole = audio.quantise(audio.load(sample.uri))
        assert row["audio"] == whole[sample.start : sample.start + sample.num_samples].tobytes()
        covered[sample.clip_id] = max(covered[sample.clip_id], sample.start + sample.num_samples)
    lengths = {clip["clip_id"]: clip["duration_s"] * 16000 for clip in table.read(clips, "clip.v1").to_pylist()}
    assert len(covered) == 6
    assert all(covered[clip_id] == lengths[clip_id] for clip_id in covered)
    with pytest.raises(RunError, match="has 12 samples here"):
        pseudolabel.run(
            config_of(Pseudolabel, clips=clips, out=str(tmp_path), recipe="as_is", segment_s=3.0, num_samples=13)
        )


@pytest.mark.slow
def test_a_killed_driver_resumes_bit_for_bit(clips: str, tmp_path: Path) -> None:
    quiet, killed = tmp_path / "quiet", tmp_path / "killed"
    config = config_of(Pseudolabel, clips=clips, out=str(quiet), num_samples=36, seed=2, rows_per_part=3)
    pseudolabel.run(config)
    command = [sys.executable, str(ROOT / "jobs" / "pseudolabel.py"), "--clips", clips, "--out", str(killed)]
    command += ["--num-samples", "36", "--seed", "2", "--rows-per-part", "3"]
    driver = subprocess.Popen(command, start_new_session=True)
    while len(shards.listed(str(killed))) < 3:
        with suppress(subprocess.TimeoutExpired):
            driver.wait(timeout=0.05)
            break
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    done = len(shards.listed(str(killed)))
    assert 3 <= done < 12 and not (killed / "summary.json").exists()
    assert subprocess.run(command).returncode == 0
    left, right = rows_of(quiet), rows_of(killed)
    assert sorted(left) == sorted(right) == list(range(36))
    for i in range(36):
        assert left[i]["audio"] == right[i]["audio"] and left[i]["plan"] == right[i]["plan"]
        assert left[i]["score"] == pytest.approx(right[i]["score"], abs=1e-5)


@pytest.mark.slow
def test_stopping_is_clean_and_says_how_to_go_on(clips: str, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "jobs" / "pseudolabel.py"), "--clips", clips, "--out", str(tmp_path / "run")]
    command += ["--num-samples", "400", "--rows-per-part", "2"]
    driver = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)
    while not shards.listed(str(tmp_path / "run")):
        with suppress(subprocess.TimeoutExpired):
            driver.wait(timeout=0.05)
            break
    driver.send_signal(signal.SIGTERM)  # as `ray job stop` does; SIGINT may be ignored where tests run in background
    _, errors = driver.communicate()
    assert driver.returncode == 130, errors
    assert "the same command resumes" in errors and "Traceback" not in errors


def hostile_files(folder: Path) -> dict[str, str]:
    """Thirty files that must be rejected, and words of the reason; good ones with odd names stand beside them."""
    good = voice(3, seed=1)
    soundfile.write(folder / "x.wav", good, 16000, subtype="PCM_16")
    soundfile.write(folder / "x.flac", good, 16000)
    soundfile.write(folder / "x.mp3", good, 16000)
    wav, flac, mp3 = ((folder / f"x.{s}").read_bytes() for s in ("wav", "flac", "mp3"))
    for suffix in ("wav", "flac", "mp3"):
        (folder / f"x.{suffix}").unlink()

    def patched(offset: int, form: str, value: float) -> bytes:
        return wav[:offset] + struct.pack(form, value) + wav[offset + struct.calcsize(form) :]

    def floats(values: np.ndarray, rate: int = 16000) -> bytes:
        soundfile.write(folder / "f.wav", values, rate, subtype="FLOAT")
        data = (folder / "f.wav").read_bytes()
        (folder / "f.wav").unlink()
        return data

    nan, inf = good.copy(), good.copy()
    nan[20000], inf[100] = np.nan, np.inf
    files = {
        "zero.wav": (b"", "empty file"),
        "zero.flac": (b"", "empty file"),
        "text.wav": (b"this is not audio\n" * 50, "not audio"),
        "html.mp3": (b"<html><body>404 not found</body></html>" * 20, "not audio"),
        "json.ogg": (b'{"error": "expired"}' * 20, "not audio"),
        "zeros.wav": (bytes(5000), "not audio"),
        "random.wav": (np.random.default_rng(0).bytes(5000), "not audio"),
        "riff-only.wav": (wav[:12], "not audio"),
        "header-only.wav": (wav[:44], ""),
        "truncated.wav": (wav[: len(wav) // 2], "truncated"),
        "truncated.flac": (flac[: len(flac) // 2], ""),
        "truncated.mp3": (mp3[: len(mp3) // 2], ""),
        "flac-header.flac": (flac[:60], ""),
        "broken.flac": (flac[:9000] + bytes(9000) + flac[18000:], ""),
        "0-hz.wav": (patched(24, "<I", 0), "not audio"),
        "1-hz.wav": (patched(24, "<I", 1), "1 Hz"),
        "4-ghz.wav": (patched(24, "<I", 4_000_000_000), ""),
        "0-channels.wav": (patched(22, "<H", 0), "0 channels"),
        "60000-channels.wav": (patched(22, "<H", 60000), ""),
        "1-gb.wav": (patched(40, "<I", 1_234_567_890), "promises 1234567890 bytes"),
        "nan.wav": (floats(nan), "NaN"),
        "inf.wav": (floats(inf), "NaN or infinite"),
        "1-sample.wav": (floats(good[:1]), "cannot be judged"),
        "0-samples.wav": (floats(good[:0]), "no samples"),
        "50-ms.wav": (floats(good[:800]), "cannot be judged"),
        "silent.wav": (floats(np.zeros(32000, np.float32)), "silent"),
        "playlist.wav": (b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.wav\n", "not audio"),
        "64-channels.wav": (floats(np.zeros((1000, 64), np.float32)), "64 channels"),
        "zip.flac": (b"PK\x03\x04" + bytes(500), "not audio"),
    }
    for name, (data, _) in files.items():
        (folder / name).write_bytes(data)
    os.mkfifo(folder / "pipe.wav")
    (folder / "loop.wav").symlink_to(folder / "loop.wav")
    (folder / "gone.wav").symlink_to(folder / "nowhere.wav")
    reasons = {name: reason for name, (_, reason) in files.items()}
    return {**reasons, "pipe.wav": "not a regular file", "loop.wav": "", "gone.wav": "cannot be read"}


def test_hostile_files_are_rejected_by_name_and_the_good_ones_labelled(
    tmp_path: Path, local_ray: None, in_process: None
) -> None:
    folder = tmp_path / "speech"
    folder.mkdir()
    reasons = hostile_files(folder)
    if os.geteuid():
        (folder / "secret.wav").write_bytes(b"RIFF")
        (folder / "secret.wav").chmod(0)
        reasons["secret.wav"] = "PermissionError"
    good = ["good.wav", "söng né.wav", "new\nline.wav", "per%20cent#?*[x].wav", "-dash.wav", "quote'\".wav"]
    for i, name in enumerate(good):
        soundfile.write(folder / name, voice(3, seed=i), 16000)
    ingest.run(Ingest(out=str(tmp_path / "m"), speech=(str(folder),)))
    out = tmp_path / "run"
    config = config_of(
        Pseudolabel, clips=f"{tmp_path}/m/clips.parquet", out=str(out), recipe="as_is", max_reject_share=1.0
    )
    summary = pseudolabel.run(config)

    labelled = {Path(Plan.from_json(row["plan"]).uri).name for row in rows_of(out).values()}
    assert labelled == set(good)
    manifest = [Path(row["uri"]).name for row in table.read(config.clips, "clip.v1").to_pylist()]
    messages = [row["message"] for row in table.read(f"{tmp_path}/m/rejects.parquet", "reject.v1").to_pylist()]
    messages += [f"{manifest[int(i)]}: {row['stage']}: {row['message']}" for i, row in rejects_of(out).items()]
    assert len(messages) == len(reasons) >= 30
    for name, reason in reasons.items():
        assert any(name in message and reason in message for message in messages), (name, reason, messages)
    assert summary.labelled == len(good)


def test_a_run_in_which_all_is_rejected_still_ends_with_its_summary(
    tmp_path: Path, local_ray: None, in_process: None
) -> None:
    (tmp_path / "speech").mkdir()
    soundfile.write(tmp_path / "speech" / "silent.wav", np.zeros(48000), 16000)
    ingest.run(Ingest(out=str(tmp_path / "m"), speech=(str(tmp_path / "speech"),)))
    config = config_of(
        Pseudolabel, clips=f"{tmp_path}/m/clips.parquet", out=f"{tmp_path}/run", recipe="as_is", max_reject_share=1.0
    )
    summary = pseudolabel.run(config)
    assert (summary.labelled, summary.rejected, summary.score_mean) == (0, 1, None)


@pytest.mark.parametrize(
    ("option", "value"), [("rows_per_part", 0), ("seed", -1), ("teach_actors", 0), ("batch_s", 0.0)]
)
def test_numbers_that_cannot_be_meant_are_refused_before_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, value: float
) -> None:
    name = f"--{option.replace('_', '-')}"
    with pytest.raises(OptionError, match=f"{name} is {value}; it must be at least"):
        config_of(Pseudolabel, clips="clips.parquet", out=str(tmp_path / "out"), **{option: value})
    assert cli.main(["pseudolabel", "--clips", "c", "--out", str(tmp_path / "out"), name, str(value)]) == 2
    assert f"{name} is {value}" in (error := capsys.readouterr().err) and "; it must be at least" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cpus", [2, 4, 16, 96])
@pytest.mark.parametrize(("gpus", "share"), [(0, None), (1, None), (1, 0.5), (2, 0.1), (8, 0.25)])
def test_default_pools_fit_any_machine(cpus: int, gpus: int, share: float | None) -> None:
    degrade, teach = job.stages(prepared(weights_free()), Pools(teach_gpus=share), cpus, gpus)
    flow.check_pools((degrade, teach), cpus, gpus)
    assert teach.pool.actors == (gpus / (share or 1) if gpus else cpus)
    assert teach.batch_rows == (64 if gpus else 8)


@pytest.mark.ray
def test_the_demo_labels_trains_promotes_scores_and_compares(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason='pip install "speechdistill[demo]"')
    command = [sys.executable, str(ROOT / "jobs" / "demo.py"), "--out", str(tmp_path), "--num-samples", "24"]
    run = subprocess.run([*command, "--steps", "2"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    clean, degraded = (row["mos"] for row in storage.read_json(f"{tmp_path}/synthetic/scores.json"))
    assert clean > degraded
    for said in ("labelled 24 samples", '"decision": "promoted"', "the student's scores: clean", "What to type next"):
        assert said in run.stdout
    (page,) = tmp_path.glob("synthetic/*-comparison/report.html")
    assert str(page) in run.stdout and all(f">{name}</th>" in page.read_text() for name in ("student", "distillmos"))


@pytest.mark.slow  # the engine's part is in test_flow.py
def test_too_many_rejects_stop_the_run_with_the_reasons(tmp_path: Path, local_ray: None) -> None:
    folder = tmp_path / "speech"
    folder.mkdir()
    for i in range(4):
        soundfile.write(folder / f"{i}.wav", voice(3, seed=i) if i else np.zeros(48000), 16000)
    ingest.run(Ingest(out=str(tmp_path / "m"), speech=(str(folder),)))
    config = config_of(Pseudolabel, clips=f"{tmp_path}/m/clips.parquet", out=f"{tmp_path}/run", recipe="as_is")
    with pytest.raises(RunError, match=r"(?s)1 of 4 samples were rejected.*--max-reject-share.*1 × teach.*silent"):
        pseudolabel.run(config)
    assert not (tmp_path / "run" / "summary.json").exists()
    assert pseudolabel.run(changed(config, max_reject_share=0.3)).labelled == 3


@pytest.fixture(scope="module")
def any_audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("any")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kind=st.sampled_from(["voice", "silence", "full scale", "dc", "noise", "impulse"]),
    seconds=st.one_of(st.just(1 / 16000), st.floats(1 / 16000, 2), st.floats(2, 60)),
    rate=st.sampled_from([8000, 16000, 44100]),
    sample_id=st.integers(0, 10**9),
    given_noise=st.booleans(),
)
def test_any_plan_on_any_audio_is_finite_and_keeps_its_length(
    any_audio: Path, kind: str, seconds: float, rate: int, sample_id: int, given_noise: bool
) -> None:
    length = max(1, int(seconds * rate), -(-rate // 16000))
    wave = {
        "voice": lambda: voice(length / rate + 1, rate)[:length],
        "silence": lambda: np.zeros(length),
        "full scale": lambda: np.sign(np.sin(np.arange(length))),
        "dc": lambda: np.full(length, 0.7),
        "noise": lambda: np.random.default_rng(0).uniform(-1, 1, length),
        "impulse": lambda: np.eye(1, length, length // 2)[0],
    }[kind]()
    for name in ("speech", "noise", "rir"):
        soundfile.write(any_audio / f"{name}.wav", wave, rate, subtype="FLOAT")
    for i in range(4):
        soundfile.write(any_audio / f"other{i}.wav", voice(1, seed=i), 16000)
    rows = [manifests.row(str(any_audio / "speech.wav"), duration_s=length / rate)]
    rows += [manifests.row(str(any_audio / f"other{i}.wav"), duration_s=1.0) for i in range(4)]
    if given_noise:
        rows += [manifests.row(str(any_audio / f"{kind}.wav"), kind, length / rate) for kind in ("noise", "rir")]
    plans = Plans(weights_free(), Clips(table.from_rows(rows, "clip.v1")), seed=0)
    of_it = (plans[i] for i in range(sample_id, sample_id + 1000))
    sample = next(sample for sample in of_it if sample.uri.endswith("speech.wav"))
    try:
        degraded, clean = samples.make_sample(sample)
    except AudioError as error:
        # Four seconds of an impulse response are read; one that is silent in them is refused.
        assert "rir.wav" in error.path and not np.any(np.abs(wave[: 4 * rate]) > 1e-5)
        return
    assert len(degraded) == len(clean) == sample.num_samples
    assert degraded.dtype == np.int16


def test_the_summary_of_the_real_recordings(
    real_audio: Path, tmp_path: Path, local_ray: None, in_process: None
) -> None:
    folders = {kind: (str(real_audio / kind),) for kind in ("speech", "noise", "rir")}
    summary = ingest.run(Ingest(out=str(tmp_path / "m"), **folders))
    assert summary.clips == {"speech": 251, "noise": 14, "rir": 4} and summary.rejected == 0
    config = config_of(Pseudolabel, clips=summary.manifest, out=str(tmp_path / "run"), num_samples=16, rows_per_part=8)
    assert pseudolabel.run(config).rejected == 0
    rows = rows_of(tmp_path / "run")
    steps = {step["step"] for row in rows.values() for step in json.loads(row["plan"])["steps"]}
    assert {"noise.RecordedNoise", "rooms.MeasuredRoom"} <= steps
