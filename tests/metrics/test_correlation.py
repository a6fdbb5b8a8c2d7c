"""Correlations and their bootstrap: known values, what has none, and when a difference is one."""

import numpy as np
import pytest

from speechdistill.metrics import correlation


def scores(clips: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Listeners' scores and a model's that follows them but for noise."""
    rng = np.random.default_rng(seed)
    mos = rng.uniform(1, 5, clips)
    return mos, np.clip(mos + noise * rng.standard_normal(clips), 1, 5)


def test_pcc_is_numpys() -> None:
    mos, model = scores(50, 0.5, 0)
    assert correlation.pcc(mos, model) == pytest.approx(np.corrcoef(mos, model)[0, 1], abs=1e-12)
    assert correlation.pcc(mos, -3 * mos + 1) == pytest.approx(-1)


@pytest.mark.parametrize(
    ("mos", "model"),
    [([1, 2], [1, 2]), ([2, 2, 2], [1, 2, 3]), ([1, 2, 3], [2, 2 + 1e-8, 2]), ([], [])],
)
def test_few_or_constant_clips_have_no_pcc(mos: list[float], model: list[float]) -> None:
    assert correlation.pcc(np.array(mos, float), np.array(model, float)) is None


def test_the_mean_weighs_datasets_by_their_clips_and_leaves_out_those_that_tell_nothing() -> None:
    mos, model = scores(45, 1.0, 1)
    names = ["a"] * 30 + ["b"] * 10 + ["two"] * 2 + ["flat"] * 3
    mos[42:] = 3.0
    rows = correlation.by_dataset(names, mos, {"model": model})
    assert [(row["dataset"], row["clips"], row["model"] is None) for row in rows] == [
        ("a", 30, False),
        ("b", 10, False),
        ("flat", 3, True),
        ("two", 2, True),
    ]
    expected = (30 * rows[0]["model"] + 10 * rows[1]["model"]) / 40
    assert correlation.mean_pcc(names, mos, model) == pytest.approx(expected, abs=1e-12)
    assert correlation.mean_pcc(names[40:], mos[40:], model[40:]) is None
    assert correlation.compare(names[40:], mos[40:], model[40:], model[40:]) is None


def test_a_model_that_says_the_same_of_a_dataset_gains_nothing_by_it() -> None:
    mos, model = scores(40, 1.0, 2)
    names = ["a"] * 20 + ["b"] * 20
    flat = np.where(np.arange(40) < 20, model, 3.0)
    first = correlation.pcc(mos[:20], model[:20])
    assert correlation.mean_pcc(names, mos, flat) == pytest.approx((first or 0) / 2)
    difference = correlation.compare(names, mos, flat, model)
    assert difference is not None and difference.high < 0


def test_a_clearly_better_model_is_and_an_equal_one_is_not() -> None:
    mos, good = scores(300, 0.3, 3)
    bad = np.clip(mos + np.random.default_rng(4).standard_normal(300), 1, 5)
    names = ["a", "b", "c"] * 100
    better = correlation.compare(names, mos, good, bad)
    assert better is not None and better.low > 0 and better.low < better.value < better.high
    worse = correlation.compare(names, mos, bad, good)
    assert worse == pytest.approx((-better.value, -better.high, -better.low))
    assert correlation.compare(names, mos, good, good) == (0, 0, 0)
    assert correlation.compare(names, mos, good, bad) == better
    assert correlation.compare(names, mos, good, bad, seed=1) != better


def test_the_interval_holds_the_true_difference_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for trial in range(200):
        truth = rng.standard_normal(100)
        one, other = (truth + rng.standard_normal(100) for _ in range(2))  # equally good
        found = correlation.compare(["a"] * 100, truth, one, other, resamples=300, seed=trial)
        assert found is not None
        held += found.low <= 0 <= found.high
    assert 178 <= held <= 199  # 95% of 200, within three standard deviations or so


def test_pairs_of_clips_make_the_interval_narrow() -> None:
    mos, model = scores(200, 1.0, 6)
    almost = model + 0.05 * np.random.default_rng(7).standard_normal(200)
    difference = correlation.compare(["a"] * 200, mos, almost, model)
    assert difference is not None and difference.high - difference.low < 0.02


def test_large_datasets_are_drawn_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    mos, good = scores(60, 0.3, 8)
    bad = np.clip(mos + np.random.default_rng(9).standard_normal(60), 1, 5)
    whole = correlation.compare(["a"] * 60, mos, good, bad, resamples=500)
    monkeypatch.setattr(correlation, "_CHUNK", 60 * 7)
    pieces = correlation.compare(["a"] * 60, mos, good, bad, resamples=500)
    assert whole is not None and pieces is not None
    assert pieces == pytest.approx(whole, abs=0.05) and pieces.value == whole.value


def test_a_dataset_for_each_clip_is_wanted() -> None:
    with pytest.raises(ValueError, match="2 datasets for values of shape"):
        correlation.mean_pcc(["a", "b"], np.arange(3.0), np.arange(3.0))
