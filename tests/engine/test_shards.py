"""Parts that users move, copy and edit: none counts twice, and none of another run counts."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_footers import commit

from label_runs import label_run
from milli import milli_flow
from speechdistill.engine import shards
from speechdistill.engine.finished_run import LabelRun
from speechdistill.io import fingerprint
from speechdistill.io.errors import RunError, TableError


def part(out: Path, k: int, ids: int = 8) -> Path:
    return out / f"shards/part-{k:08d}-{ids:08d}.parquet"


def test_a_part_under_another_parts_name_is_refused(tmp_path: Path) -> None:
    layout = milli_flow(tmp_path, 40).layout
    label_run(tmp_path, 40, rows_per_part=8)
    shutil.copy(part(tmp_path, 0), part(tmp_path, 3))
    for look in (shards.survey, shards.finish):
        with pytest.raises(RunError, match=r"part-00000003-00000008.parquet is part 0 of 8 ids, copied under"):
            look(layout)
    with pytest.raises(RunError, match=r"part-00000005-00000008.parquet is part 0"):
        part(tmp_path, 3).rename(part(tmp_path, 5))
        shards.survey(replace(layout, num_ids=48))


def test_a_name_that_only_ends_like_a_parts_is_no_part(tmp_path: Path) -> None:
    layout = milli_flow(tmp_path, 40).layout
    label_run(tmp_path, 40, rows_per_part=8)
    part(tmp_path, 2).rename(tmp_path / "shards/old-part-00000002-00000008.parquet")
    assert shards.survey(layout)[0] == [2]
    assert shards.strangers(layout.out) == ["old-part-00000002-00000008.parquet"]


def test_a_part_of_another_run_is_refused_and_one_of_an_earlier_version_is_not(tmp_path: Path) -> None:
    ours, theirs = ({"seed": seed} for seed in (1, 2))
    one, other = (milli_flow(tmp_path / name, 16).layout for name in ("one", "other"))
    for layout, identity in ((one, ours), (other, theirs)):
        shards.claim(layout.out, identity)
    one, other = replace(one, run=fingerprint.of(ours)), replace(other, run=fingerprint.of(theirs))
    commit(one, 0)
    commit(replace(other, run=""), 1)
    shutil.copy(part(tmp_path / "other", 1), part(tmp_path / "one", 1))
    assert shards.survey(one)[0] == [], "earlier versions wrote no name of the run"
    commit(other, 1)
    shutil.copy(part(tmp_path / "other", 1), part(tmp_path / "one", 1))
    with pytest.raises(RunError, match=r"part-00000001-00000008.parquet is a part of another run"):
        shards.survey(one)


def test_a_run_whose_folder_was_moved_writes_nothing_into_one_begun_under_its_name(tmp_path: Path) -> None:
    layout = replace(milli_flow(tmp_path / "run", 16).layout, run=fingerprint.of({"seed": 1}))
    shards.claim(layout.out, {"seed": 1})
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(RunError, match="is not the run's folder on this node"):
        commit(layout, 0)
    shards.claim(layout.out, {"seed": 2})
    with pytest.raises(RunError, match="was moved or deleted, and another run was started there"):
        commit(layout, 0)
    assert not shards.listed(layout.out)


@pytest.mark.parametrize("content", ["{}", "[]", '{"fingerprint": "0", "configuration": {"seed": 1}}'])
def test_an_edited_run_json_is_refused(content: str, tmp_path: Path) -> None:
    label_run(tmp_path, 16)
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(TableError, match=r"run.json was edited"):
        shards.claim(str(tmp_path), {"seed": 1})
    with pytest.raises(TableError, match=r"run.json was edited"):
        LabelRun(str(tmp_path))


def test_a_shard_that_is_not_the_manifests_is_not_read(tmp_path: Path) -> None:
    """Rows that were made again have other samples in the places that are held out."""
    run = LabelRun(label_run(tmp_path / "run", 48, fails=(3,)))
    label_run(tmp_path / "again", 48)
    shutil.copy(part(tmp_path / "again", 0, 24), part(tmp_path / "run", 0, 24))
    reads = (lambda: run.read_group(0), lambda: list(run.read(np.array([1]))), lambda: run.groups.columns("sample_id"))
    for read in reads:
        with pytest.raises(TableError, match=r"part-00000000-00000024.parquet is not the file that .* manifest lists"):
            read()
    assert len(run.read_group(2)) == 16
