"""Which samples make a batch: a pure function of seed and step, whoever reads it."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from label_runs import label_run, some_clips
from manifests import row
from milli import Degrade
from speechdistill.data import scored_clips
from speechdistill.data.label_scale import LabelTransform, Scale
from speechdistill.data.scored_clips import Labeled
from speechdistill.engine.finished_run import LabelRun
from speechdistill.io import audio, table
from speechdistill.io.errors import AudioError, TableError, UserError
from speechdistill.training import launch
from speechdistill.training.batches import Batches, Mix, Ref, Walk
from speechdistill.training.lanes import share


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    return label_run(tmp_path_factory.mktemp("labels"), 24 * 100)


@pytest.fixture
def scored(tmp_path: Path) -> Labeled:
    return Labeled(some_clips(tmp_path), LabelTransform())


def ids(batches: Batches, steps: range) -> Iterator[Ref]:
    for t in steps:
        yield from batches.refs(t)


def test_an_epoch_of_a_walk_is_every_row_once_in_a_new_order() -> None:
    sizes = np.array([16, 16, 3, 16, 9, *[16] * 20])
    walk = Walk(np.arange(len(sizes)), sizes, (0, 1))
    length = int(sizes.sum())
    first, second = ([walk[n] for n in range(epoch * length, (epoch + 1) * length)] for epoch in (0, 1))
    everything = {(group, place) for group, size in enumerate(sizes) for place in range(size)}
    assert set(first) == set(second) == everything and len(first) == len(second) == length
    assert first != second
    assert [walk[n] for n in (5, 2 * length - 1, 5)] == [first[5], second[-1], first[5]]  # no state


def test_a_batch_is_a_pure_function_of_seed_and_step(run: str, scored: Labeled) -> None:
    mix = Mix(shards=(run,), labeled_percent=20)
    batches = Batches(mix, scored)
    assert list(ids(batches, range(50, 60))) == list(ids(Batches(mix, scored), range(60)))[50 * 20 :]
    assert list(ids(batches, range(5))) != list(ids(Batches(Mix(shards=(run,), seed=1), scored), range(5)))


@pytest.mark.parametrize(("percent", "lanes"), [(0, 0), (10, 2), (20, 4), (40, 8), (80, 16), (100, 20)])
def test_so_many_lanes_are_labeled(run: str, scored: Labeled, percent: float, lanes: int) -> None:
    batches = Batches(Mix(shards=(run,) if percent < 100 else (), labeled_percent=percent), scored)
    for t in range(5):
        assert [ref.run < 0 for ref in batches.refs(t)] == [True] * lanes + [False] * (20 - lanes)


def test_lanes_go_through_all_samples_once_before_any_comes_again(run: str) -> None:
    batches = Batches(Mix(shards=(run,), labeled_percent=0))
    count = Counter((ref.group, ref.row) for ref in ids(batches, range(60)))
    assert max(count.values()) == 1
    lane_of = {}
    for t in range(300):
        for lane, ref in enumerate(batches.refs(t)):
            assert lane_of.setdefault(ref.group, lane) == lane  # a worker reads only its own row groups


def test_adjacent_samples_share_a_row_group_at_most_twice_as_often_as_after_a_full_shuffle(run: str) -> None:
    batches = Batches(Mix(shards=(run,), labeled_percent=0))
    steps = range(120)  # an epoch

    def shared(groups: list[int]) -> float:
        return float(np.mean([a == b for a, b in pairwise(groups)]))

    walked = [ref.group for ref in ids(batches, steps)]
    shuffled = np.random.default_rng(0).permutation(np.array(walked))
    assert shared(walked) <= 2 * shared(shuffled.tolist())
    # Nor are they together in a batch.
    within = [len(set(walked[i : i + 20])) for i in range(0, len(walked), 20)]
    assert np.mean(within) > 0.95 * np.mean(
        [len(set(shuffled[i : i + 20].tolist())) for i in range(0, len(walked), 20)]
    )


@pytest.mark.parametrize("world", [1, 2, 3, 7, 20])
def test_workers_share_a_batch_whatever_their_number(run: str, scored: Labeled, world: int) -> None:
    batches = Batches(Mix(shards=(run,), crop_s=0.01), scored)
    whole = next(batches.stream(7, 8, 0, 1)).parts[0]
    parts = [next(batches.stream(7, 8, rank, world)).parts[0] for rank in range(world)]
    assert [name for part in parts for name in part.ids] == whole.ids
    assert {part.totals["mse"] for part in parts} == {20} and not {part.number for part in parts} - {0}
    for name, array in whole.arrays.items():
        np.testing.assert_array_equal(np.concatenate([part.arrays[name] for part in parts]), array)


def test_more_workers_than_lanes_are_refused(run: str) -> None:
    with pytest.raises(ValueError, match="21 workers cannot share batches of 20"):
        share(20, 0, 21)


def test_what_is_read_is_what_the_shards_hold(run: str, scored: Labeled) -> None:
    batches = Batches(Mix(shards=(run,), crop_s=0.02), scored)  # longer than the waves: padded
    for (part,) in (batch.parts for batch in batches.stream(0, 3, 0, 1)):
        inputs, targets = part.arrays["inputs"], part.arrays["targets"]
        assert inputs.shape == (20, 320) and inputs.dtype == np.float32
        for name, wave, target in list(zip(part.ids, inputs, targets, strict=True))[4:]:
            (known,) = Degrade()([{"id": int(name.removeprefix(f"{run}#"))}])
            np.testing.assert_array_equal(wave[:160], audio.decode(known["audio"], "pcm16"))
            assert not wave[160:].any() and target == pytest.approx(wave[:160].mean())


def test_runs_are_mixed_by_weight(run: str, tmp_path: Path) -> None:
    other = label_run(tmp_path / "other", 24 * 60, seed=1)
    batches = Batches(Mix(shards=(f"{run}=3", other), labeled_percent=0))
    refs = list(ids(batches, range(1000)))
    assert Counter(ref.run for ref in refs) == {0: 15_000, 1: 5_000}
    held = [len(one.left_out) for one in batches.held]
    assert len({ref[:3] for ref in refs}) == 24 * 160 - sum(held)  # no other is left out
    of_small = Counter((ref.group, ref.row) for ref in refs if ref.run == 1)  # too few groups for twenty lanes
    assert set(of_small.values()) == {3, 4}


@pytest.mark.parametrize("place", ["=0", "=-1", "=nan", "=inf"])
def test_a_weight_that_is_none_is_refused(run: str, place: str) -> None:
    with pytest.raises(ValueError, match=r"the weight is .*; give a number above 0"):
        LabelRun(run + place)


def test_a_label_run_that_is_given_twice_is_refused_even_as_a_copy(run: str, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "copy")
    other = label_run(tmp_path / "other", 24, seed=7)
    assert len(launch.label_runs([f"{run}=0.5", other], [], validate=False)[0]) == 2
    for again in (f"{run}/", f"{run}=0.5", str(tmp_path / "copy")):
        with pytest.raises(UserError, match="give it once, with a weight such as"):
            launch.label_runs([run, again], [], validate=False)


def test_a_run_that_is_not_complete_is_refused_by_name(tmp_path: Path) -> None:
    out = label_run(tmp_path / "run", 48)
    (tmp_path / "run" / "summary.json").unlink()
    with pytest.raises(TableError, match=f"{out}: not a complete label run"):
        LabelRun(out)


def test_a_shard_that_was_lost_or_damaged_is_named(tmp_path: Path) -> None:
    labels = LabelRun(label_run(tmp_path / "labels", 48))
    first, second = (Path(labels.out) / path for path in labels.groups.paths)
    first.write_bytes(first.read_bytes()[:-9])
    second.unlink()
    for group, path in ((0, first), (3, second)):
        with pytest.raises(TableError, match=f"{path} was lost or damaged"):
            labels.read_group(group)


def test_datasets_are_drawn_by_their_capped_size() -> None:
    rows = [row(f"/{i}", mos=3.0, dataset="large" if i < 14_000 else "small") for i in range(14_700)]
    scored = Labeled(table.from_rows(rows, "clip.v1"), LabelTransform())
    rng = np.random.default_rng(0)
    drawn = [scored.datasets.draw(rng) for _ in range(22_000)]
    small = sum(number >= 14_000 for number in drawn)
    assert small / len(drawn) == pytest.approx(700 / 7_700, abs=0.01)
    assert scored.datasets.counts == {"large": 14_000, "small": 700}


def test_a_clip_that_cannot_be_used_is_replaced_by_the_next_of_its_dataset(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = some_clips(tmp_path)
    scored = Labeled(rows, LabelTransform())
    (tmp_path / "1.wav").write_bytes(b"RIFF")
    for _ in range(2):
        _, target, uri = scored.read(1, 0.0, 800)
        assert (target, uri) == (1 + 2 / 4, str(tmp_path / "2.wav"))
    assert len([r for r in caplog.records if "1.wav" in r.getMessage()]) == 1


def test_crops_lie_inside_their_clip(scored: Labeled) -> None:
    for crop in (0.0, 0.5, 0.999999):
        wave, _, _ = scored.read(11, crop, 800)
        assert len(wave) == 800 and wave.any()
    assert len(scored.read(0, 0.7, 3200)[0]) == 1600  # shorter than a crop: whole


def test_scores_are_mapped_to_the_universal_scale(tmp_path: Path) -> None:
    document = {"universal": {"a": 1.2, "b": -0.1}, "datasets": {"a": {"a": 0.8, "b": 0.4}}}
    path = tmp_path / "t.json"
    path.write_text(json.dumps(document))
    transform = LabelTransform.read(str(path))
    heard = 1 + 4 / (1 + np.exp(-(0.8 * 0.7 + 0.4)))  # a quality logit of 0.7 as dataset a hears it
    assert transform(heard, "a") == pytest.approx(1 + 4 / (1 + np.exp(-(1.2 * 0.7 - 0.1))))
    assert transform(3.3, "unknown") == 3.3
    assert 1 < transform(1.0, "a") < transform(5.0, "a") < 5
    assert transform.to_json() == document
    assert LabelTransform.read(None) == LabelTransform({}, Scale())


@pytest.mark.parametrize(
    ("document", "place"),
    [
        ({"universal": {"a": 1, "b": 0}}, "datasets"),
        ({"universal": {"a": 0, "b": 0}, "datasets": {}}, r"universal\.a"),
        ({"universal": {"a": 1, "b": 0}, "datasets": {"x": {"a": 1}}}, r"datasets\.x.*'b'"),
    ],
)
def test_a_transform_that_does_not_fit_is_refused_with_the_place(tmp_path: Path, document: object, place: str) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(document))
    with pytest.raises(TableError, match=f"t.json: label_transform.v1.*{place}"):
        LabelTransform.read(str(path))


def test_a_plain_csv_is_a_labeled_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    some_clips(tmp_path)
    (tmp_path / "mine.csv").write_text("path,mos\n0.wav,4.5\n1.wav,\n3.wav,2\n")
    rows = scored_clips.manifest(f"{tmp_path}/mine.csv")
    assert rows["mos"].to_pylist() == [4.5, 2.0]
    assert rows["duration_s"].to_pylist() == pytest.approx([0.1, 0.4])
    assert "mine.csv: 3 rows = 3 files (2 with a score); 1 left out, without a score; 2 clips are used" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path\n0.wav\n", "none of its 1 speech clips has a score"),
        ("path,mos\n0.wav,9\n", r"0\.wav: mos '9' is not a number from 1 to 5 .*mine.csv, line 2"),
        ("path,mos\n0.wav,good\n", "mos 'good' is not a number"),
        ("path,mos\nno.wav,3\n", r"no\.wav"),
    ],
)
def test_a_labeled_set_that_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    some_clips(tmp_path)
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises((TableError, AudioError), match=message):
        scored_clips.manifest(f"{tmp_path}/mine.csv")


def test_the_split_is_the_corpus_own_or_by_speaker(tmp_path: Path) -> None:
    rows = some_clips(tmp_path)
    train, validation = scored_clips.split(rows)
    assert len(validation) > 0 and not set(train["speaker"].to_pylist()) & set(validation["speaker"].to_pylist())
    assert len(train) + len(validation) == len(rows)
    named = rows.set_column(
        rows.schema.get_field_index("split"), "split", pa.array(["train", "validation", "test"] * 4)
    )
    train, validation = scored_clips.split(named)
    assert (len(train), len(validation)) == (4, 4)


def test_a_mix_that_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="give some, or 100% labeled"):
        Mix(shards=(), labeled_percent=20)
    with pytest.raises(ValueError, match="0 to 100%"):
        Mix(shards=("x",), labeled_percent=101)
    with pytest.raises(ValueError, match="give --labeled"):
        Batches(Mix(shards=("x",), labeled_percent=20))
