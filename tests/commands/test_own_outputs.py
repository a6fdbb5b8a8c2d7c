"""A folder is one command's: two would replace each other's files and go on with each other's MLflow run."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from configs import prepared
from label_runs import label_run
from manifests import corpus_manifest, manifest
from speechdistill import cli
from speechdistill.commands import outputs
from speechdistill.commands.pseudolabel import _keep_manifest
from speechdistill.data.degradation_recipes import weights_free
from speechdistill.engine import held_out, shards
from speechdistill.engine.finished_run import LabelRun
from speechdistill.io import fingerprint, storage, table
from speechdistill.io.errors import RunError, TableError

RUNS = {
    "ingest": ("ingest.json", {}),
    "pseudolabel": ("run.json", {"configuration": {"job": "pseudolabel"}, "fingerprint": "0"}),
    "compare": ("tracking/events-1-000000.jsonl", {"event": "run", "experiment": "compare"}),
}


def begun(out: Path, command: str) -> None:
    name, content = RUNS[command]
    storage.publish(json.dumps(content).encode(), f"{out}/{name}")


@pytest.mark.parametrize("there", RUNS)
@pytest.mark.parametrize("command", ["ingest", "pseudolabel", "train-students", "compare"])
def test_the_folder_of_another_command_is_refused(there: str, command: str, tmp_path: Path) -> None:
    begun(tmp_path, there)
    if command == there:
        outputs.check_own(str(tmp_path), command)
        return
    with pytest.raises(RunError, match=rf"holds the output of `speechdistill {there}`; give {command} an --out"):
        outputs.check_own(str(tmp_path), command)


def test_a_folder_that_two_share_already_is_left_to_both(tmp_path: Path) -> None:
    outputs.check_own(str(tmp_path / "new"), "ingest")
    (tmp_path / "run.json").write_text('{"configuration": 3}')
    outputs.check_own(str(tmp_path), "ingest")
    for command in ("ingest", "compare"):
        begun(tmp_path, command)
    for command in ("ingest", "compare"):
        outputs.check_own(str(tmp_path), command)
    with pytest.raises(RunError, match="`speechdistill compare` and `speechdistill ingest`"):
        outputs.check_own(str(tmp_path), "prune")


def test_the_shards_of_a_run_are_no_output_and_no_run(tmp_path: Path) -> None:
    out = label_run(tmp_path, 16)
    with pytest.raises(RunError, match=r"/shards holds the parts of a run; give pseudolabel an --out of its own"):
        outputs.check_own(f"{out}/shards/", "pseudolabel")
    with pytest.raises(TableError, match=r"/shards is a folder inside the run (.*); give \1$"):
        LabelRun(f"{out}/shards")


def test_ingest_leaves_the_manifest_of_a_label_run_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begun(tmp_path / "labels", "pseudolabel")
    corpus_manifest(tmp_path / "corpus")
    out = str(tmp_path / "labels")
    assert cli.main(["ingest", "--speech", f"{tmp_path}/corpus/speech", "--out", out]) == 1
    assert "holds the output of `speechdistill pseudolabel`" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "labels").iterdir()] == ["run.json"]


def test_a_changed_copy_of_the_manifest_is_not_labelled_from(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clips, copy = str(tmp_path / "clips.parquet"), tmp_path / "run/clips.parquet"
    storage.publish(table.parquet_bytes(manifest()), clips)
    sha256 = fingerprint.of_file(clips)
    job = replace(prepared(weights_free()), clips=clips, clips_sha256=sha256)
    _keep_manifest(job, str(copy.parent))
    storage.publish(table.parquet_bytes(manifest(speech=3)), str(copy))
    _keep_manifest(job, str(copy.parent))
    assert fingerprint.of_file(str(copy)) == sha256 and "has changed since the run was started" in caplog.text


def test_held_out_samples_are_not_found_by_a_changed_manifest(tmp_path: Path) -> None:
    out = label_run(tmp_path, 48)
    storage.publish(table.parquet_bytes(manifest()), f"{out}/clips.parquet")
    known = {"seed": 0, "clips_sha256": fingerprint.of_file(f"{out}/clips.parquet")}
    (tmp_path / "run.json").unlink()
    storage.publish_json({"fingerprint": fingerprint.of(known), "configuration": known}, f"{out}/run.json")
    assert shards.configuration(out) == known and held_out.held_out([LabelRun(out)])
    storage.publish(table.parquet_bytes(manifest(noise=0)), f"{out}/clips.parquet")
    with pytest.raises(TableError, match=r"clips.parquet was changed since the run was started"):
        held_out.held_out([LabelRun(out)])
