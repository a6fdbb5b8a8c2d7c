"""Figures of merit: against scipy, worked examples, the paper's table, and what is not defined."""

import csv
from pathlib import Path

import numpy as np
import pytest
from scipy import optimize, stats

from speechdistill.comparing import paper
from speechdistill.data import listening_tests
from speechdistill.metrics import correlation, figures
from speechdistill.metrics.figures import METRICS

TABLE = Path(__file__).parents[1] / "fixtures" / "table1_pcc.csv"


def scores(clips: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mos = rng.uniform(1, 5, clips).round(1)  # with ties, as listeners give them
    return mos, np.clip(mos + noise * rng.standard_normal(clips), 1, 5)


def test_paper_table_means() -> None:
    """The weighted and the plain mean of each of the eleven rows are those that the paper prints."""
    with TABLE.open(newline="") as file:
        counts, *rows = csv.DictReader(file)
    sets = [name for name in counts if counts[name] and name != "model"]
    clips = [int(counts[name]) for name in sets]
    assert (len(rows), len(sets), sum(clips)) == (11, 16, 46_050)
    for row in rows:
        weighted, plain = figures.means(clips, [float(row[name]) if row[name] else None for name in sets])
        assert weighted == pytest.approx(float(row["weighted_mean"]), abs=0.01), row["model"]
        assert plain == pytest.approx(float(row["unweighted_mean"]), abs=0.01), row["model"]
        ours = paper.rows()[row["model"]]
        assert (ours.weighted, ours.plain) == (float(row["weighted_mean"]), float(row["unweighted_mean"]))
        assert paper.clips() == dict(zip(sets, clips, strict=True))


def test_our_names_lead_to_the_papers() -> None:
    assert paper.rows()["squim_pesq"].pcc["dns3_fb"] is None
    assert paper.row_of("distillmos") == "distillmos_v7" and paper.row_of("dnsmos_p808") == "dnsmos_p808"
    assert paper.row_of("nisqa") == "nisqa" and paper.row_of("utmos") == "utmos"
    assert paper.dataset_of("voicemos2022_en") == "voicemos_en" and paper.dataset_of("tub") == "tub"
    assert {paper.dataset_of(name) for name in listening_tests.READERS} >= set(paper.clips()), (
        "a test set has no reader"
    )
    assert paper.row_of("v0") is None and paper.dataset_of("mine") is None


@pytest.mark.parametrize("seed", range(3))
def test_correlations_and_errors_are_scipys(seed: int) -> None:
    mos, model = scores(60, 0.7, seed)
    found = {name: value.value for name, value in figures.measured(mos, model).items()}
    assert list(found) == list(METRICS)
    assert found["pcc"] == pytest.approx(stats.pearsonr(mos, model).statistic, abs=1e-12)
    assert found["srcc"] == pytest.approx(stats.spearmanr(mos, model).statistic, abs=1e-12)
    assert found["ktau"] == pytest.approx(stats.kendalltau(mos, model).statistic, abs=1e-12)
    assert found["mse"] == pytest.approx(np.mean((mos - model) ** 2))
    assert found["rmse"] == pytest.approx(np.sqrt(np.mean((mos - model) ** 2)))
    assert figures._srccs(mos[None], model[None])[0] == pytest.approx(found["srcc"], abs=1e-12)


def test_a_first_order_mapping_by_hand() -> None:
    # Means 3 and 3; sum of squares of the scores 10, of products 8: slope 0.8, offset 0.6. Residuals -0.4, 0.8, 0,
    # -0.8, 0.4 have squares that sum to 1.6, over 5 clips less 2 coefficients.
    model, mos = np.array([1.0, 2, 3, 4, 5]), np.array([1.8, 1.4, 3, 4.6, 4.2])
    line = figures.mapping(mos, model, 1)
    assert line(model) == pytest.approx(0.6 + 0.8 * model)
    assert figures.measured(mos, model)["rmse_first"].value == pytest.approx(np.sqrt(1.6 / 3))


def test_a_third_order_mapping_that_rises_is_the_least_squares_fit() -> None:
    model = np.linspace(1, 5, 40)
    cubic = np.polynomial.Polynomial([0.4, 0.7, -0.1, 0.03])
    assert figures.mapping(cubic(model), model, 3)(model) == pytest.approx(cubic(model), abs=1e-9)
    noisy = cubic(model) + 0.1 * np.random.default_rng(0).standard_normal(40)
    errors = np.polynomial.Polynomial.fit(model, noisy, 3)(model) - noisy
    expected = np.sqrt(errors @ errors / 36)
    assert figures.measured(noisy, model)["rmse_third"].value == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_a_third_order_mapping_never_falls_and_is_the_best_that_does_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    model = np.sort(rng.uniform(1, 5, 30))
    mos = 3 + np.sin(2.5 * model + seed) + 0.1 * rng.standard_normal(30)  # no rising curve fits it well
    rising = figures.mapping(mos, model, 3)
    grid = np.linspace(model.min(), model.max(), 2_000)
    assert np.diff(rising(grid)).min() > -1e-9
    powers = np.vander((grid - 1) / 4, 4, increasing=True)
    inner = np.vander((model - 1) / 4, 4, increasing=True)
    other = optimize.minimize(
        lambda c: np.sum((inner @ c - mos) ** 2),
        [3, 1, 0, 0],
        method="SLSQP",
        constraints={"type": "ineq", "fun": lambda c: np.diff(powers[::20] @ c)},
        options={"maxiter": 500},
    )
    assert np.sum((rising(model) - mos) ** 2) == pytest.approx(other.fun, rel=1e-3)


def test_a_model_that_is_wrong_way_round_is_mapped_to_a_constant() -> None:
    mos, _ = scores(30, 0, 1)
    for order in (1, 3):
        assert figures.mapping(mos, -mos, order)(-mos) == pytest.approx(np.full(30, mos.mean()))


@pytest.mark.parametrize(
    ("mos", "model", "missing", "why"),
    [
        ([1, 2], [1, 2], set(METRICS), "2 of the 3 clips"),
        ([], [], set(METRICS), "0 of the 3 clips"),
        ([1, 2, float("nan")], [1, 2, 3], set(METRICS), "NaN"),
        ([1, 2, 3], [1, 2, float("inf")], set(METRICS), "NaN or infinite"),
        ([2, 2, 2, 2, 2], [1, 2, 3, 4, 5], set(METRICS) - {"mse", "rmse"}, "listeners' scores are all the same"),
        ([1, 2, 3, 4, 5], [3, 3, 3, 3, 3], set(METRICS) - {"mse", "rmse"}, "model's scores are all the same"),
        ([1, 2, 3, 4], [1, 2, 4, 3], {"rmse_third"}, "4 clips are too few for a mapping of 4 coefficients"),
    ],
)
def test_what_is_not_defined_says_why(mos: list[float], model: list[float], missing: set[str], why: str) -> None:
    found = figures.measured(np.array(mos, float), np.array(model, float))
    assert {name for name, value in found.items() if value.value is None} == missing
    assert all(why in found[name].why for name in missing)


def test_means_leave_out_what_is_not_there() -> None:
    datasets = np.array(["a"] * 40 + ["b"] * 10 + ["flat"] * 5, object)
    mos, model = scores(55, 0.8, 2)
    mos[50:] = 3
    found = figures.compute(datasets, mos, {"model": model}, resamples=100)
    of_model, mean = found.values["model"], found.means["model"]["pcc"]
    a, b = (of_model[name]["pcc"].value for name in "ab")
    assert found.clips == {"a": 40, "b": 10, "flat": 5}
    assert mean.datasets == 2 and found.means["model"]["mse"].datasets == 3
    assert mean.weighted.value == pytest.approx((40 * a + 10 * b) / 50)
    assert mean.plain.value == pytest.approx((a + b) / 2)
    for value in (of_model["a"]["pcc"], of_model["b"]["rmse"], mean.weighted, mean.plain):
        assert value.low < value.value < value.high
    assert of_model["flat"]["pcc"].low is None
    none = figures.compute(datasets[50:], mos[50:], {"model": model[50:]}, 100).means["model"]["pcc"]
    assert (none.weighted.value, none.plain.value) == (None, None) and none.weighted.why


def test_clips_count_that_all_models_could_score() -> None:
    datasets = np.array(["a"] * 4 + ["b"] * 3, object)
    mos = np.array([1.0, 2, 3, 4, 1, 2, 3])
    one = np.array([1.0, 2, np.nan, 4, np.nan, np.nan, np.nan])  # has no figures of b
    other = np.array([1.0, 2, 3, 4, 3, 2, 1])
    models = {"one": one, "other": other}
    counts = figures.counted(datasets, mos, models)
    assert counts.tolist() == [True, True, False, True, True, True, True]
    assert figures.counted(datasets, mos, {"one": one}).tolist() == [True, True, False, True, False, False, False]
    found = figures.compute(
        datasets[counts], mos[counts], {name: values[counts] for name, values in models.items()}, resamples=50
    )
    assert found.clips == {"a": 3, "b": 3}
    assert "none of its clips" in found.values["one"]["b"]["pcc"].why
    assert found.values["other"]["b"]["pcc"].value == pytest.approx(-1)
    assert found.means["one"]["pcc"].datasets == 1


def test_systems_are_the_means_of_their_clips() -> None:
    datasets = np.array(["a", "a", "a", "b", "b"], object)
    systems = ["x", "x", None, "x", "y"]
    values = np.array([1.0, 3, 5, 2, 4])
    names, mos, models = figures.by_system(datasets, systems, values, {"model": 2 * values})
    assert names.tolist() == ["a", "b", "b"]
    assert mos.tolist() == [2, 2, 4] and models["model"].tolist() == [4, 4, 8]
    assert figures.compute(*figures.by_system(datasets, [None] * 5, values, {"model": values})).clips == {}


def test_intervals_hold_the_true_correlation_as_often_as_they_say() -> None:
    rng = np.random.default_rng(3)
    held = 0
    for trial in range(200):
        one, noise = rng.standard_normal((2, 100))
        other = 0.8 * one + 0.6 * noise  # correlated by 0.8
        drawn = correlation.resampled(["a"] * 100, one, {"model": other}, resamples=300, seed=trial)["model"][0]
        low, high = correlation.interval(drawn)
        held += low <= 0.8 <= high
    assert 175 <= held <= 199  # 95% of 200; percentiles of so few clips hold a little less


def test_every_two_models_are_compared_on_the_same_clips() -> None:
    mos, good = scores(300, 0.3, 4)
    bad = np.clip(mos + np.random.default_rng(5).standard_normal(300), 1, 5)
    names = ["a", "b"] * 150
    found = correlation.compare_all(names, mos, {"good": good, "bad": bad, "same": good}, resamples=200)
    assert list(found) == [("good", "bad"), ("good", "same"), ("bad", "same")]
    assert found["good", "same"] == (0, 0, 0) and found["good", "bad"].low > 0 > found["bad", "same"].high
    assert found["good", "bad"] == correlation.compare(names, mos, good, bad, resamples=200)
    assert correlation.compare_all(["a", "b"], mos[:2], {"good": good[:2], "bad": bad[:2]}) == {}
