"""Plans: pure, complete, and with the paper's probabilities."""

import json
import math
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import chisquare, kstest, norm, uniform

from manifests import clips
from speechdistill.data import components, plan
from speechdistill.data.degradation_recipes import RECIPES, as_is, paper, weights_free
from speechdistill.data.plan import Plan, Plans, RecipeStage
from speechdistill.io import assets
from speechdistill.io.assets import Asset


def steps_of(sample: Plan) -> list[str]:
    return [json.loads(sample.to_json())["steps"][i]["step"].split(".")[1] for i in range(len(sample.steps))]


EXPECTED = {  # of each step, over all samples
    "paper": {
        "CoquiTts": 0.15,
        "MeasuredRoom": 0.85 * 0.33,
        "RecordedNoise": 0.85 * 0.67,
        "DeepFilterNet3": 0.85 / 5,
        "NSNet2": 0.85 / 5,
        "Demucs": 0.85 / 5,
        "SpectralGating": 0.85 / 5,
        "HifiGan": 0.85 * 0.33,
        "Opus": 0.85 / 6,
        "EnCodec": 0.85 / 6,
        "BandLimit": 0.85 / 6,
    },
    "weights_free": {
        "MeasuredRoom": 0.33,
        "RecordedNoise": 0.67,
        "SpectralGating": 0.2,
        "Opus": 1 / 6,
        "BandLimit": 1 / 6,
    },
    "voip": {
        "MeasuredRoom": 0.33,
        "RecordedNoise": 0.67,
        "Clipping": 0.2,
        "LevelChanges": 0.3,
        "OpusLoss": 0.5,
        "Telephone": 0.3,
    },
}


@pytest.mark.parametrize("total", [10_000, pytest.param(200_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("recipe", EXPECTED)
def test_steps_have_their_probabilities_and_parameters_their_distributions(
    recipe: str, total: int, tmp_path: Path
) -> None:
    plans = Plans(replace(RECIPES[recipe](), assets=given(tmp_path)), clips(), seed=11)
    counts: Counter[str] = Counter()
    values: dict[str, list[float]] = defaultdict(list)
    for i in range(total):
        for step in plans[i].steps:
            counts[type(step).__name__] += 1
            for name in ("snr_db", "over_db", "loss", "fec", "codec", "bandwidth_kbps", "model"):
                if hasattr(step, name):
                    values[name].append(getattr(step, name))
    print(f"\n{recipe}: step, share drawn, share expected")
    for name, p in EXPECTED[recipe].items():
        print(f"  {name:<16}{counts[name] / total:8.4f}{p:8.4f}")
        # five standard deviations of a binomial: a false alarm once in two million
        assert abs(counts[name] - total * p) < 5 * math.sqrt(total * p * (1 - p)), (name, counts[name])
    assert set(counts) == set(EXPECTED[recipe])
    assert_normal(values["snr_db"], 10, 10)
    if recipe == "voip":
        assert_uniform(values["over_db"], 3, 20)
        assert_uniform(np.log(values["loss"]), *np.log([0.01, 0.2]))
        codecs = Counter(values["codec"])
        assert codecs["g722"] / codecs["amr_nb"] == pytest.approx(1, abs=0.2)
        assert np.mean(values["fec"]) == pytest.approx(0.5, abs=0.03)

    if recipe == "paper":
        for name, number in (("bandwidth_kbps", 5), ("model", 17)):
            counted = Counter(values[name])
            assert len(counted) == number and chisquare(list(counted.values())).pvalue > 1e-6, counted


def given(folder: Path) -> dict[str, Asset]:
    """Sentences in the five languages, and names of networks that are not there: plans open none."""
    for language in ("en", "de", "fr", "es", "pt"):
        (folder / f"{language}.txt").write_text("One sentence.\nAnother one.\n")
    names = {need.name: need for stage in paper().stages for c in stage.odds for need in components.component(c).needs}
    return {name: Asset(f"/{name}", "0") for name in names} | {"texts": assets.looked_up(names["texts"], str(folder))}


def assert_normal(values: list[float], mean: float, sigma: float) -> None:
    print(f"  normal: mean {np.mean(values):.3f} ({mean}), standard deviation {np.std(values):.3f} ({sigma})")
    assert kstest(values, norm(mean, sigma).cdf).pvalue > 1e-6


def assert_uniform(values: Sequence[float], low: float, high: float) -> None:
    print(f"  uniform: {np.min(values):.3f} to {np.max(values):.3f} ({low:.3f} to {high:.3f})")
    assert kstest(values, uniform(low, high - low).cdf).pvalue > 1e-6


def test_steps_come_in_the_papers_order() -> None:
    order = ["MeasuredRoom", "RecordedNoise", "SpectralGating", "Opus", "BandLimit"]
    plans = Plans(weights_free(), clips(), seed=0)
    most = 0
    for i in range(2000):
        places = [order.index(name) for name in steps_of(plans[i])]
        assert places == sorted(places) and not {3, 4} <= set(places)
        most = max(most, len(places))
    assert most == 4


def test_each_epoch_uses_every_clip_once_and_more_samples_only_add() -> None:
    plans = Plans(weights_free(), clips(speech=50), seed=3)
    assert len(plans) == 50
    first, second = ([plans[i].clip_id for i in range(k, k + 50)] for k in (0, 50))
    assert len(set(first)) == len(set(second)) == 50
    assert first != second


def test_a_plan_does_not_depend_on_process_or_order() -> None:
    code = (
        "from manifests import clips; from speechdistill.data.degradation_recipes import weights_free;"
        "from speechdistill.data.plan import Plans; p = Plans(weights_free(), clips(), 5);"
        "print('\\n'.join(p[i].to_json() for i in (77, 3, 1_000_000)))"
    )
    paths = [str(Path(plan.__file__).parents[2]), str(Path(__file__).parents[1])]
    run = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r};{code}"]
    there = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split("\n")[:3]
    here = Plans(weights_free(), clips(), 5)
    assert [here[i].to_json() for i in (3, 77, 1_000_000)] == [there[1], there[0], there[2]]


def test_json_round_trip() -> None:
    plans = Plans(weights_free(), clips(noise=0, rir=0), seed=9)
    for i in range(300):
        assert Plan.from_json(plans[i].to_json()) == plans[i]


def test_seeds_and_samples_differ() -> None:
    a, b = (Plans(weights_free(), clips(), seed) for seed in (1, 2))
    texts = {p[i].to_json() for p in (a, b) for i in range(50)}
    assert len(texts) == 100


def test_segments_lie_inside_their_clips() -> None:
    manifest = clips()
    lengths = {manifest.speech[i].clip_id: manifest.speech[i].num_samples for i in range(50)}
    plans = Plans(weights_free(), manifest, seed=0)
    for i in range(500):
        sample = plans[i]
        assert sample.start >= 0 and sample.start + sample.num_samples <= lengths[sample.clip_id]
        assert sample.num_samples == min(122_880, lengths[sample.clip_id])


def test_as_is_covers_whole_files_in_order_without_degrading() -> None:
    manifest = clips(speech=20)
    plans = Plans(as_is(), manifest, seed=0)
    covered: dict[str, list[tuple[int, int]]] = {}
    for i in range(len(plans)):
        assert plans[i].steps == ()
        covered.setdefault(plans[i].clip_id, []).append((plans[i].start, plans[i].num_samples))
    assert list(covered) == [manifest.speech[i].clip_id for i in range(20)]
    for i in range(20):
        clip = manifest.speech[i]
        end = 0
        for start, length in covered[clip.clip_id]:
            assert start <= end and length == min(122_880, clip.num_samples)
            end = start + length
        assert end == clip.num_samples
    with pytest.raises(IndexError, match=f"there are {len(plans)}"):
        plans[len(plans)]


def test_a_stage_that_ends_leaves_the_sample_undegraded() -> None:
    ends = RecipeStage("generation", {"codecs.band_limit": 1.0}, ends=True)
    recipe = replace(weights_free(), stages=(ends, *weights_free().stages))
    assert steps_of(Plans(recipe, clips(), 0)[0]) == ["BandLimit"]


def test_a_manifest_without_speech_is_refused() -> None:
    with pytest.raises(ValueError, match="--speech DIR"):
        Plans(weights_free(), clips(speech=0), 0)
