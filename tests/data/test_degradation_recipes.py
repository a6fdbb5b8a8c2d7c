"""Degradation recipes: the paper's odds, and what is left out, given or missing."""

import pytest

from speechdistill.data import components
from speechdistill.data.degradation_recipes import chosen, network_passes, paper, weights_free, with_assets
from speechdistill.data.plan import DegradationRecipe, RecipeStage
from speechdistill.io.assets import Asset
from speechdistill.io.errors import MissingError


def test_weights_free_gives_missing_components_to_none() -> None:
    odds = {stage.name: (dict(stage.odds), stage.none()) for stage in weights_free().stages}
    assert odds == {
        "room": ({"rooms.room": 0.33}, pytest.approx(0.67)),
        "noise": ({"noise.noise": 0.67}, pytest.approx(0.33)),
        "denoiser": ({"denoisers.spectral_gating": 0.2}, pytest.approx(0.8)),
        "codec": (
            {"codecs.opus": pytest.approx(1 / 6), "codecs.band_limit": pytest.approx(1 / 6)},
            pytest.approx(2 / 3),
        ),
    }


def test_paper_has_the_papers_odds_and_says_what_is_missing_before_any_work() -> None:
    assert {stage.name: round(stage.none(), 9) for stage in paper().stages} == {
        "generation": 0.85,
        "room": 0.67,
        "noise": 0.33,
        "denoiser": 0.2,
        "vocoder": 0.67,
        "codec": 0.5,
    }
    assert paper(lpcnet=True).stages[4].odds == {"vocoders.hifigan": 0.165, "vocoders.lpcnet_codec2": 0.165}
    with pytest.raises(MissingError) as caught:
        with_assets(paper())
    neural = {c for stage in paper().stages for c in stage.odds if components.component(c).network}
    assert neural <= set(caught.value.components)
    for part in (
        "denoisers.nsnet2: ",
        "nsnet2-20ms-baseline.onnx",
        "licence: MIT",
        "github.com",
        "--assets nsnet2 PATH",
    ):
        assert part in str(caught.value)
    assert "recipe 'weights_free' works without them; --without " in str(caught.value)


def test_a_recipe_is_chosen_with_what_the_user_leaves_out_and_gives() -> None:
    recipe = chosen("paper", ("denoisers.demucs", "generated.text_to_speech"), {"encodec": "/e"}, lpcnet=True)
    assert [stage.name for stage in recipe.stages] == ["room", "noise", "denoiser", "vocoder", "codec"]
    assert recipe.stages[2].none() == pytest.approx(2 / 5) and recipe.assets == {"encodec": Asset("/e")}
    spoken = chosen("weights_free", (), {"texts": "/t"})
    assert spoken.stages[0] == RecipeStage("generation", {"generated.espeak": 0.15}, ends=True)
    for name, without, given, lpcnet, message in (
        ("voip", ("codecs.opus",), {}, False, r"recipe voip has no such component; choose from rooms.room, "),
        ("weights_free", (), {"nsnet2": "/n"}, False, "recipe weights_free does not use it; .*used: texts"),
        ("as_is", (), {}, True, "--lpcnet is an option of recipe paper"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(name, without, given, lpcnet)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kinds", "passes"),
    [
        ("", 0),
        ("c", 0),
        ("n", 1),
        ("cnc", 1),
        ("nnn", 1),
        ("ncn", 2),
        ("ncncn", 3),
        ("b", 1),
        ("bnb", 1),
        ("bbb", 2),
        ("e", 1),
        ("ecn", 1),
    ],
)
def test_a_recipe_goes_to_its_networks_as_often_as_its_samples_may_need(kinds: str, passes: int) -> None:
    odds = {"c": {"codecs.opus": 0.5}, "n": {"codecs.encodec": 0.5}, "e": {"codecs.encodec": 0.1}}
    odds["b"] = {**odds["c"], **odds["n"]}
    stages = tuple(RecipeStage(str(i), odds[kind], ends=kind == "e") for i, kind in enumerate(kinds))
    assert network_passes(DegradationRecipe("r", stages)) == passes
