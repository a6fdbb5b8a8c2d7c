"""Held-out samples of label runs: whole speakers or clips, by name alone, and no batch has them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from label_runs import label_run
from manifests import row
from speechdistill.engine.finished_run import LabelRun
from speechdistill.engine.held_out import by_row_groups, held_out
from speechdistill.io import storage, table
from speechdistill.training.batches import Batches, Mix

Known = Callable[[int], dict[str, object]]


def clip_40(i: int) -> dict[str, object]:
    """A run of 40 clips, with a recording of noise, or babble of another clip, in every third sample."""
    more = {0: ["noise"], 3: [f"clip{(i + 7) % 40}"]}.get(i % 6, [])
    return {"clip_ids": [f"clip{i % 40}", *more]}


def speaker_12(i: int) -> dict[str, object]:
    return {"clip_ids": [f"clip{i % 40}"], "speaker": f"s{i % 40 % 12}"}


def run_of(folder: Path, known: Known, num_ids: int = 240, **options: int) -> str:
    run = label_run(folder, num_ids, known=known, **options)
    kinds = {"noise": "noise", **{f"clip{i}": "speech" for i in range(40)}}
    rows = [{**row(f"/{name}.wav", kind), "clip_id": name} for name, kind in kinds.items()]
    storage.publish(table.parquet_bytes(table.from_rows(rows, "clip.v1")), f"{run}/clips.parquet")
    return run


def clips_at(run: LabelRun, places: np.ndarray) -> list[list[str]]:
    lists = run.groups.columns("clip_ids")["clip_ids"].to_pylist()
    return [lists[place] for place in places]


def trained(batches: Batches, steps: int) -> list[set[int]]:
    """The places in each run of all that the first batches hold."""
    found: list[set[int]] = [set() for _ in batches.runs]
    for ref in (ref for t in range(steps) for ref in batches.refs(t)):
        found[ref.run].add(int(batches.runs[ref.run].groups.starts[ref.group]) + ref.row)
    return found


def test_no_held_out_clip_is_in_any_batch_not_even_as_babble(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", clip_40)
    batches = Batches(Mix(shards=(run,), labeled_percent=0, hold_out=True))
    (held,), (labels,) = batches.held, batches.runs
    (there,) = trained(batches, 100)
    held_clips = {clips[0] for part in (held.test, held.validation) for clips in clips_at(labels, part)}
    assert len(held.test) >= 16 <= len(held.validation) and not set(held.test) & set(held.validation)
    heard = {clip for clips in clips_at(labels, np.array(sorted(there))) for clip in clips}
    assert not held_clips & heard and "noise" in heard
    assert there == set(range(240)) - set(held.left_out.tolist()), "something else is left out"
    shares = [[score for _, score in batches.held_out(rank, 3)] for rank in range(3)]
    expected = [row["score"] for _, row in labels.read(held.validation)]
    assert [*shares[0], *shares[1], *shares[2]] == expected == [score for _, score in batches.held_out(0, 1)]


def test_known_speakers_are_held_out_whole(tmp_path: Path) -> None:
    run = LabelRun(run_of(tmp_path, speaker_12))
    (held,) = held_out([run])
    speakers = np.array(run.groups.columns("speaker")["speaker"].to_pylist())
    kept = np.setdiff1d(np.arange(240), held.left_out)
    parts = [set(speakers[places]) for places in (held.test, held.validation, kept)]
    assert all(parts) and sum(map(len, parts)) == 12
    assert held.about and held.about["by"] == "speaker" and held.about["test"]["samples"] == len(held.test)


def test_the_set_is_a_function_of_names_whatever_order_and_size_the_run_has(tmp_path: Path) -> None:
    def reversed_clips(i: int) -> dict[str, object]:
        return {"clip_ids": [f"clip{(239 - i) % 40}"]}

    one = LabelRun(run_of(tmp_path / "one", lambda i: {"clip_ids": [f"clip{i % 40}"]}))
    other = LabelRun(run_of(tmp_path / "other", reversed_clips, rows_per_part=7))
    clips = []
    for run in (one, other):
        (held,) = held_out([run])
        clips.append([{names[0] for names in clips_at(run, part)} for part in (held.test, held.validation)])
    assert clips[0] == clips[1] and all(clips[0])
    large = LabelRun(label_run(tmp_path / "large", 1_200, rows_per_part=240))
    (held,) = held_out([large])
    assert 16 < len(held.test) < 55 and 16 < len(held.validation) < 55, "a fortieth each"


def test_what_one_run_holds_out_no_other_trains(tmp_path: Path) -> None:
    small = run_of(tmp_path / "small", lambda i: {"clip_ids": [f"clip{i % 40}"]}, 40)
    batches = Batches(Mix(shards=(small, run_of(tmp_path / "large", clip_40)), labeled_percent=0))
    held = {clips[0] for run, one in zip(batches.runs, batches.held, strict=True) for clips in clips_at(run, one.test)}
    for run, places in zip(batches.runs, trained(batches, 300), strict=True):
        assert not held & {clip for clips in clips_at(run, np.array(sorted(places))) for clip in clips}
    alone = held_out([LabelRun(small)])[0].test
    np.testing.assert_array_equal(alone, batches.held[0].test)


def test_generated_samples_are_held_out_one_by_one(tmp_path: Path) -> None:
    def generated(i: int) -> dict[str, object]:
        return {"clip_ids": [f"clip{i % 40}"]} if i % 2 else {"clip_ids": ["noise"] if i % 4 else []}

    run = LabelRun(run_of(tmp_path, generated))
    (held,) = held_out([run])
    assert len(held.left_out) < 80, "those with the same noise are one group"
    assert any(not clips or clips == ["noise"] for clips in clips_at(run, held.left_out))


def test_a_speaker_of_most_samples_trains(tmp_path: Path) -> None:
    def known(i: int) -> dict[str, object]:
        return {"clip_ids": [f"clip{i}"], "speaker": "most" if i % 2 else f"s{i % 40}"}

    run = LabelRun(label_run(tmp_path, 240, known=known))
    (held,) = held_out([run])
    assert len(held.test) >= 16 <= len(held.validation) and not (held.left_out % 2).any()


@pytest.mark.parametrize("num_speakers", [1, 3])
def test_of_too_few_speakers_none_is_held_out_and_it_is_said(tmp_path: Path, num_speakers: int) -> None:
    run = label_run(tmp_path, 240, known=lambda i: {"clip_ids": [f"clip{i % 40}"], "speaker": f"s{i % num_speakers}"})
    (held,) = held_out([LabelRun(run)])
    assert not len(held.left_out) and not len(held.test)
    assert held.about == {"too_few": f"240 samples of {num_speakers} speakers are too few to hold some out"}


def test_the_rule_of_earlier_versions_takes_whole_row_groups(tmp_path: Path) -> None:
    run = LabelRun(label_run(tmp_path, 240))
    held = by_row_groups(run, validates=True)
    groups = np.searchsorted(run.groups.starts, held.validation, side="right") - 1
    assert held.validation.tolist() == held.left_out.tolist() and len(set(groups)) == 1
    assert len(held.validation) == run.groups.sizes[groups[0]] and held.about is None
    assert not len(by_row_groups(run, validates=False).left_out)
