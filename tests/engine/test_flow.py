"""The engine: every id exactly once, whatever fails or is killed."""

import contextlib
import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

import milli
from configs import changed
from label_runs import assert_exactly_once, contents, label_run, rejects_of, rows_of
from milli import Degrade, Teach, milli_flow
from speechdistill.engine import flow, parts, shards, stages
from speechdistill.io import table
from speechdistill.io.errors import RunError, UserError

MILLI = Path(__file__).parents[1] / "milli.py"


def test_failing_rows_are_rejected_alone_and_killed_workers_lose_nothing(tmp_path: Path, local_ray: None) -> None:
    out, quiet = tmp_path / "run", tmp_path / "quiet"
    label_run(quiet, 37, rows_per_part=8)
    degrade = Degrade(fails=(3,), aborts=(5,), hoards=(20,), killed=(17,), marks=str(tmp_path))
    teach = Teach(fails=(9,), killed=(11, 30), marks=str(tmp_path))
    totals = flow.run(milli_flow(out, 37, degrade, teach, max_reject_share=0.5))
    assert sorted(p.name for p in tmp_path.glob("killed-*")) == [f"killed-{i}" for i in (11, 17, 30)]
    rejects = rejects_of(out)
    assert list(rejects) == [3, 5, 9, 20]
    assert rejects[3] == {"id": "3", "stage": "degrade", "error_type": "ValueError", "message": "id 3 is bad"}
    assert rejects[5]["error_type"] == "ChildDied" and "SIGABRT" in rejects[5]["message"]
    assert (rejects[9]["stage"], rejects[9]["error_type"]) == ("teach", "ArithmeticError")
    assert "Memory" in rejects[20]["error_type"] and rejects[20]["stage"] == "degrade"
    labelled = {i: row for i, row in rows_of(quiet).items() if i not in rejects}
    assert rows_of(out) == labelled and list(rows_of(out)) == list(labelled), "labelled once, in order and as ever"
    assert (totals.labelled, totals.rejected) == (33, 4)
    assert totals.sums["audio_s"] == pytest.approx(0.33)
    file = min((out / "shards").glob("*.parquet"))
    part = json.loads(pq.read_metadata(file).metadata[b"part"])
    assert part["labelled"] == 6 and [reject["id"] for reject in part["rejects"]] == ["3", "5"]
    assert part["content_sha256"] == shards.content_hash(pq.read_table(file))


@pytest.mark.slow  # waits for its reports; test_pseudolabel.py sees them in MLflow
def test_a_run_tells_how_far_it_is(tmp_path: Path, local_ray: None) -> None:
    reports: list[dict[str, float]] = []
    flow.run(
        milli_flow(tmp_path, 160, Degrade(fails=(3,)), max_reject_share=0.5, report=reports.append, report_every_s=0.3)
    )
    last = reports[-1]
    assert (last["done"], last["labelled"], last["rejected"]) == (160, 159, 1)
    assert last["rejected/degrade.ValueError"] == 1
    assert last["eta_s"] == 0 and last["queue/teach"] == last["queue/write"] == 0
    assert [report["done"] for report in reports] == sorted(report["done"] for report in reports)
    assert any(report["samples_per_s"] > 0 and report.get("per_s/audio_s", 0) > 0 for report in reports)
    assert any(report.get("busy/teach", 0) > 0 for report in reports)
    assert all(0 <= report.get("cpu_use", 0) <= 1 and report["nodes"] == 1 for report in reports)
    assert any("cpu_use" in report for report in reports)


def test_a_run_ends_when_its_time_is_up_and_goes_on_later(tmp_path: Path, local_ray: None) -> None:
    """It begins as one of 44 ids with two rejects, which are tried again, and grows."""
    label_run(tmp_path, 44, rows_per_part=8, fails=(9, 20))
    good = {k: next((tmp_path / "shards").glob(f"part-{k:08d}-*")).stat().st_mtime_ns for k in (0, 3, 4)}
    committed: list[int] = []
    job = milli_flow(
        tmp_path,
        160,
        teach=Teach(waits_for=(150, str(tmp_path / "later"))),
        retry_rejected=True,
        on_part=lambda part: committed.append(part.number),
    )
    totals = flow.run(changed(job, max_hours=12 / 3600))
    assert 0 < totals.done == sum(shards.listed(str(tmp_path)).values()) < 160, "parts wait for later ones"
    assert not (tmp_path / "manifest.parquet").exists()
    left, _ = shards.survey(job.layout, retry_rejected=True)
    committed.clear()
    (tmp_path / "later").touch()
    totals = flow.run(changed(job, max_hours=1))
    assert (totals.labelled, totals.rejected) == (160, 0)
    assert_exactly_once(tmp_path, 160)
    assert sorted(committed) == left, "each new part is told once"
    files = sorted((tmp_path / "shards").glob("part-*"))
    assert len(files) == 20
    assert good == {k: files[k].stat().st_mtime_ns for k in good}, "committed parts were made again"


@pytest.mark.slow  # waits until nothing has moved for a while
def test_a_run_in_which_nothing_moves_starts_its_pools_anew(
    tmp_path: Path, local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    hanging = Teach(hangs=(90,), marks=str(tmp_path))
    totals = flow.run(milli_flow(tmp_path / "run", 160, teach=hanging, stall_s=6, report_every_s=0.5))
    assert (tmp_path / "hung-90").exists() and totals.labelled == 160
    assert any("the pools are restarted" in record.message for record in caplog.records)
    assert_exactly_once(tmp_path / "run", 160)


@pytest.mark.slow  # a dry run is in test_pseudolabel.py
def test_a_trial_writes_nothing_and_knows_what_it_cost(tmp_path: Path, local_ray: None) -> None:
    trial = flow.trial(milli_flow(tmp_path / "run", 10_000, Degrade(fails=(0,))), 40)
    assert (trial.num_ids, trial.labelled) == (40, 39), "the first part is in it"
    assert {stage: work.rows for stage, work in trial.work.items()} == {"degrade": 40, "teach": 40, "write": 40}
    assert all(work.cpu_s > 0 and work.busy_s > 0 for work in trial.work.values())
    assert trial.size_bytes > 40 * 320 and not (tmp_path / "run").exists()


@pytest.mark.slow  # another start of the pools
def test_a_trial_of_a_small_run_is_all_of_it(tmp_path: Path, local_ray: None) -> None:
    assert flow.trial(milli_flow(tmp_path / "run", 3), 40).num_ids == 3


def test_a_killed_driver_resumes_to_the_same_bits(tmp_path: Path, local_ray: None) -> None:
    out, num_ids = tmp_path / "run", 240
    quiet = label_run(tmp_path / "quiet", num_ids, rows_per_part=8)
    command = [sys.executable, str(MILLI), str(out), str(num_ids), ray.get_runtime_context().gcs_address]
    driver = subprocess.Popen(command, start_new_session=True)
    while len(shards.listed(str(out))) < 5:
        with contextlib.suppress(subprocess.TimeoutExpired):
            driver.wait(timeout=0.05)
            break
    assert driver.poll() is None, "the run ended before it could be killed"
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    before = shards.listed(str(out))
    assert 5 <= len(before) < num_ids // 8
    kept = {path.name: path.stat().st_mtime_ns for path in (out / "shards").glob("part-*")}
    flow.run(milli_flow(out, num_ids))
    assert_exactly_once(out, num_ids)
    assert contents(out) == contents(Path(quiet))
    after = {path.name: path.stat().st_mtime_ns for path in (out / "shards").glob("part-*")}
    assert kept.items() <= after.items(), "committed parts were made again"


def test_another_configuration_and_a_damaged_part_are_refused(tmp_path: Path) -> None:
    label_run(tmp_path, 20, rows_per_part=8)
    with pytest.raises(RunError, match=r"(?s)another configuration.*seed: 0 -> 1.*--out"):
        flow.run(milli_flow(tmp_path, 50, seed=1))
    shard = min((tmp_path / "shards").glob("*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(RunError, match=r"is damaged.*delete it"):
        flow.run(milli_flow(tmp_path, 50))


def test_too_many_rejects_stop_the_run(tmp_path: Path, local_ray: None) -> None:
    job = milli_flow(tmp_path, 112, Degrade(fails=tuple(range(0, 112, 3))))
    with pytest.raises(RunError, match=r"(?s)--max-reject-share.*ValueError.*--retry-rejected"):
        flow.run(job)
    there = shards.listed(str(tmp_path))
    assert len(there) < 14, "the run did not stop early"
    with pytest.raises(RunError, match="--max-reject-share"):
        flow.run(job)
    assert shards.listed(str(tmp_path)) == there


@pytest.mark.slow  # all tries to start an actor
@pytest.mark.parametrize("isolated", [False, True])
def test_an_actor_that_cannot_start_ends_the_run_with_its_reason(
    isolated: bool, tmp_path: Path, local_ray: None
) -> None:
    job = milli_flow(tmp_path, 8)
    broken = replace(job.stages(2, 0)[1], make=milli.no_weights, actors=1, isolated=isolated)
    with pytest.raises(RunError, match=r"^the run .*no weights on this node; install them; .*rerun the command$"):
        flow.run(replace(job, stages=lambda cpus, gpus: (job.stages(2, 0)[0], broken)))


@pytest.mark.slow  # all tries to start an actor
@pytest.mark.parametrize("isolated", [False, True])
def test_a_fault_of_the_program_in_an_actor_keeps_its_traceback(
    isolated: bool, tmp_path: Path, local_ray: None
) -> None:
    job = milli_flow(tmp_path, 8)
    broken = replace(job.stages(2, 0)[1], make=milli.wrong_network, actors=1, isolated=isolated)
    with pytest.raises(
        ray.exceptions.RayError, match=r"in wrong_network\n(.*\n)*.*RuntimeError: shape mismatch"
    ) as error:
        flow.run(replace(job, stages=lambda cpus, gpus: (job.stages(2, 0)[0], broken)))
    assert not isinstance(error.value, UserError)
    assert "rerun the command" in error.value.__notes__[0]


def test_pools_that_would_hang_are_refused() -> None:
    stage = milli_flow("unused", 1).stages(1, 0)[0]
    with pytest.raises(RunError, match=r"want 0\.25 CPUs, but only 0 of the cluster's 1"):
        stages.check_pools((stage,), 1, 0)


def test_a_block_of_whole_parts_is_written_and_any_other_is_not(tmp_path: Path) -> None:
    layout = milli_flow(tmp_path, 20).layout
    block = rejected(layout, 2, 0)
    with pytest.raises(RunError, match=r"not the run's folder on this node; --out must be storage that all nodes"):
        shards.write_parts(block, layout)
    shards.claim(layout.out, {})
    with pytest.raises(AssertionError, match="7 of part 0's 8 ids"):
        shards.write_parts(block.slice(0, 11), layout)
    assert not (tmp_path / "shards").exists()
    footers = shards.write_parts(block, layout)
    assert [json.loads(text)["part"] for text in footers["part"].to_pylist()] == [2, 0]
    assert shards.listed(str(tmp_path)) == {0: 8, 2: 4}


def test_parts_that_nobody_sees_end_the_run_with_the_fix(tmp_path: Path) -> None:
    layout = milli_flow(tmp_path, 16).layout
    with pytest.raises(RunError, match=r"2 parts were written but are not in .*storage that all nodes share"):
        shards.finish(layout)


def test_the_protocol_holds_on_a_url() -> None:
    layout = milli_flow("memory://run", 20).layout
    shards.claim(layout.out, {"seed": 1})
    with pytest.raises(RunError, match="seed: 1 -> 2"):
        shards.claim(layout.out, {"seed": 2})
    shards.write_parts(rejected(layout, 0, 2), layout)
    missing, totals = shards.survey(layout)
    assert (missing, totals.rejected) == ([1], 12)
    grown = milli_flow("memory://run", 40).layout
    shards.reopen(grown)
    assert shards.survey(grown)[0] == [1, 2, 3, 4], "the part that must grow is still there"
    shards.write_parts(rejected(grown, 1, 2, 3, 4), grown)
    shards.finish(grown)
    assert len(table.read("memory://run/manifest.parquet", "shard.v1")) == 5
    assert len(table.read("memory://run/rejects/rejects.parquet", "reject.v1")) == 40


def rejected(layout: shards.Layout, *numbers: int) -> pa.Table:
    """A block of these parts in which every row is rejected."""
    block = pa.concat_tables([parts.block(layout.ids(k)) for k in numbers])
    for name in ("reject_stage", "reject_type", "reject_message"):
        block = block.set_column(block.column_names.index(name), name, pa.array(["no"] * len(block)))
    for name in milli.COLUMNS:
        block = block.append_column(name, pa.nulls(len(block), table.schema("pseudolabel.v1").field(name).type))
    return block
