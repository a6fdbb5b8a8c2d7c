"""What a recipe does, in words and as a sound."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from manifests import corpus_manifest
from speechdistill import cli
from speechdistill.data import components
from speechdistill.data.clips import Clips
from speechdistill.data.degradation_recipes import RECIPES, voip
from speechdistill.data.plan import Plans
from speechdistill.labelling.samples import make_sample


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    return corpus_manifest(tmp_path_factory.mktemp("corpus"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_shown_with_every_component_and_probability(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipe", "show", name]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    shown = {(words[0], words[1]): words[2:] for words in lines if len(words) > 2 and words[2].endswith("%")}
    asked = {words[0].rstrip(":") for words in lines if words and words[0].endswith(":")} - {f"{name}:", "SNR"}
    for stage in RECIPES[name]().stages:
        for component, probability in [*stage.odds.items(), ("none", stage.none())]:
            percent, *note = shown.pop((stage.name, component))
            assert float(percent[:-1]) == pytest.approx(100 * probability, abs=0.05)
            needs = components.component(component).needs if component != "none" else ()
            assert [word.rstrip(",") for word in note if word not in ("then", "nothing", "else", "needs")] == [
                need.name for need in needs
            ]
            assert {need.name for need in needs} <= asked
    assert not shown


def test_a_sample_is_the_one_that_the_labelling_job_makes(
    clips: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--clips", clips, "--seed", "1", "--index", "17", "--out", f"{tmp_path}/x.wav"]
    assert cli.main(["recipe", "listen", "voip", *where]) == 0
    expected = Plans(voip(), Clips.read(clips), 1)[17]
    assert json.loads(capsys.readouterr().out) == json.loads(expected.to_json())
    for wave, name in zip(make_sample(expected), ("x.wav", "x-clean.wav"), strict=True):
        written, rate = soundfile.read(tmp_path / name, dtype="int16")
        assert rate == 16_000
        np.testing.assert_array_equal(written, wave)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["paper"], "recipe 'weights_free' works without them"),
        (["as_is", "--index", "100000"], "--index 100000: sample 100000 does not exist; there are"),
        (["voip", "--clips", "none.parquet"], "none.parquet"),
    ],
)
def test_what_cannot_be_made_is_told(
    clips: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = [*options, *(["--clips", clips] if "--clips" not in options else []), "--out", f"{tmp_path}/x.wav"]
    assert cli.main(["recipe", "listen", *given]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "x.wav").exists()
