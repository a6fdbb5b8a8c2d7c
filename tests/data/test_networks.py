"""Steps that networks do: in batches, between the others in the plan's order, from weights that are known."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest

import small_models
from configs import changed, config_of, prepared
from manifests import corpus_manifest, voice
from speechdistill import cli
from speechdistill.commands import pseudolabel
from speechdistill.commands.pseudolabel import Pseudolabel
from speechdistill.data import components, degradation, sentences
from speechdistill.data.clips import Clips
from speechdistill.data.degradation import Neural
from speechdistill.data.degradation_recipes import chosen, network_passes, paper, with_assets
from speechdistill.data.degradations import codecs
from speechdistill.data.plan import DegradationRecipe, Plan, Plans, RecipeStage
from speechdistill.engine import flow
from speechdistill.engine.pools import Pools
from speechdistill.io import assets, storage, table
from speechdistill.io.assets import Asset, Need
from speechdistill.io.errors import MissingError, RunError
from speechdistill.labelling import job, samples

FACTOR = Need("factor", "a file with a number", "https://example.org/factor", "CC0")


@dataclass(frozen=True)
class Scaled(Neural):
    """The smallest network: a number from a file. It fails for a batch that has a wave of zeros."""

    need: ClassVar[Need] = FACTOR
    batches: ClassVar[list[int]] = []

    offset: float

    @classmethod
    def load(cls, path: Path, device: str) -> Any:
        return float(path.read_text())

    def apply_batch(self, network: Any, waves: np.ndarray) -> np.ndarray:
        self.batches.append(len(waves))
        if not waves.any(axis=1).all():
            raise ArithmeticError("a silent wave")
        return (network * waves + self.offset).astype(np.float32)


@pytest.fixture(scope="module")
def encodec(tmp_path_factory: pytest.TempPathFactory) -> Asset:
    folder = small_models.encodec(tmp_path_factory.mktemp("encodec"))
    return assets.looked_up(codecs.EnCodec.need, folder)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> str:
    return corpus_manifest(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def factor(tmp_path: Path) -> Iterator[Asset]:
    (tmp_path / "factor").write_text("0.5")
    Scaled.batches.clear()
    yield assets.looked_up(FACTOR, f"{tmp_path}/factor")


@pytest.mark.parametrize(
    ("device", "last", "batches"),
    [("cuda", [True] * 5, [3, 1, 1]), ("cuda", [True] * 4 + [False], [2, 1, 1, 1]), ("cpu", [True] * 5, [1] * 5)],
)
def test_on_a_gpu_equal_steps_that_end_their_plans_share_a_batch_of_equal_lengths(
    factor: Asset, monkeypatch: pytest.MonkeyPatch, device: str, last: list[bool], batches: list[int]
) -> None:
    monkeypatch.setattr(degradation, "_device", lambda: device)
    one, other = Scaled(*factor, 0.0), Scaled(*factor, 1.0)
    waves = [np.full(n, n, np.float32) for n in (3, 3, 4, 3, 3)]
    made = degradation.apply_together([one, one, one, other, one], waves, last)
    assert Scaled.batches == batches
    for step, wave, result in zip([one, one, one, other, one], waves, made, strict=True):
        np.testing.assert_array_equal(result, 0.5 * wave + step.offset)


def test_a_wave_that_fails_fails_alone(factor: Asset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(degradation, "_device", lambda: "cuda")
    waves = [np.ones(3, np.float32), np.zeros(3, np.float32), np.ones(3, np.float32)]
    first, silent, last = degradation.apply_together([Scaled(*factor, 0.0)] * 3, waves, [True] * 3)
    assert isinstance(silent, ArithmeticError)
    np.testing.assert_array_equal([first, last], np.full((2, 3), 0.5))


def test_weights_that_have_changed_are_refused(factor: Asset) -> None:
    Path(factor.source).write_text("0.7")
    with pytest.raises(ValueError, match="factor has changed since the run was started"):
        Scaled(*factor, 2.0).apply(np.ones(3, np.float32))


@pytest.mark.parametrize("num_samples", [1, 100, 16_001])
@pytest.mark.parametrize("kbps", [1.5, 24.0])
def test_encodec_keeps_the_length_and_a_batch_changes_nothing(encodec: Asset, num_samples: int, kbps: float) -> None:
    step = codecs.EnCodec(*encodec, kbps)
    rng = np.random.default_rng(num_samples)
    waves = (0.1 * rng.standard_normal((3, num_samples))).astype(np.float32)
    for wave, batched in zip(waves, degradation.apply_batch(step, waves), strict=True):
        alone = step.apply(wave)
        assert alone.shape == wave.shape and alone.dtype == np.float32 and np.isfinite(alone).all()
        np.testing.assert_allclose(batched, alone, atol=1e-4)
    assert not np.allclose(step.apply(waves[0]), waves[0])
    assert components.from_json(components.to_json(step)) == step


def test_encodec_is_drawn_at_each_of_its_bandwidths(encodec: Asset) -> None:
    scene = degradation.Scene("c", None, 16_000, Clips(table.from_rows([], "clip.v1")), assets={"encodec": encodec})
    drawn = {codecs.encodec.draw(np.random.default_rng(seed), scene) for seed in range(100)}
    assert {step.bandwidth_kbps for step in drawn} == {1.5, 3.0, 6.0, 12.0, 24.0}
    assert {(step.weights, step.sha256) for step in drawn} == {encodec}


def test_a_folder_that_is_no_encodec_is_told(tmp_path: Path, encodec: Asset) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=f"{tmp_path} is not the folder of the EnCodec model"):
        codecs.EnCodec(*assets.looked_up(codecs.EnCodec.need, str(tmp_path)), 6.0).apply(voice(0.1))


def two_passes(encodec: Asset) -> DegradationRecipe:
    """Networks before and after the noise, and ordinary steps before, between and behind them."""
    stages = (
        RecipeStage("room", {"rooms.room": 0.5}),
        RecipeStage("first", {"codecs.encodec": 0.5}),
        RecipeStage("noise", {"noise.noise": 0.5}),
        RecipeStage("second", {"codecs.encodec": 0.6}),
        RecipeStage("third", {"codecs.encodec": 0.2, "codecs.opus": 0.3}),
    )
    return DegradationRecipe("two", stages, segment_s=0.5, assets={"encodec": encodec})


def test_pools_make_what_the_plan_says_in_its_order(clips: str, encodec: Asset) -> None:
    recipe = two_passes(encodec)
    assert network_passes(recipe) == 2
    degrade = samples.Degrade(clips, recipe, 0, "pcm16", True, samples.libraries(recipe))
    enhance = samples.Enhance(recipe)
    rows: list[dict[str, Any]] = [{"id": i} for i in range(40)]
    visits = []
    for work in (degrade, enhance, degrade, enhance, degrade):
        for state, result in zip(rows, work([dict(before) for before in rows]), strict=True):
            assert isinstance(result, dict), result
            state.update(pickle.loads(pickle.dumps(result)))  # as between processes
        visits.append(sum(state["wave"] is not None for state in rows))
    assert visits[0] > visits[2] > 0 == visits[4], visits
    for state in rows:
        sample = Plan.from_json(state["plan"])
        assert state["done"] == len(sample.steps)
        degraded, clean = samples.make_sample(sample)
        assert state["audio"] == degraded.tobytes()
        assert state["reference"] == clean.tobytes() and state["num_samples"] == len(clean) == 8000


def test_a_node_without_the_weights_cannot_start(tmp_path: Path, encodec: Asset) -> None:
    gone = replace(two_passes(encodec), assets={"encodec": encodec._replace(source=f"{tmp_path}/none")})
    with pytest.raises(MissingError, match=f"{tmp_path}/none does not exist"):
        samples.Enhance(gone)


@pytest.mark.slow  # its kills are in test_flow.py, its stages in the test before, without Ray
def test_the_job_with_networks_labels_what_the_plans_say_and_keeps_the_hash(
    clips: str, tmp_path: Path, encodec: Asset, local_ray: None
) -> None:
    without = [name for stage in paper().stages for name in stage.odds if name != "codecs.encodec"]
    without = [name for name in without if components.component(name).network]
    config = config_of(
        Pseudolabel,
        **{"clips": clips, "out": str(tmp_path / "run"), "recipe": "paper", "without": tuple(without)},
        assets={"encodec": encodec.source},
        **{"num_samples": 16, "rows_per_part": 8, "segment_s": 0.5, "audio_format": "pcm16", "seed": 2},
    )
    summary = pseudolabel.run(config)
    assert (summary.labelled, summary.rejected) == (16, 0)
    rows = [
        r for file in sorted((tmp_path / "run" / "shards").glob("*.parquet")) for r in pq.read_table(file).to_pylist()
    ]
    assert sorted(row["sample_id"] for row in rows) == list(range(16)) and "wave" not in rows[0]
    plans = [Plan.from_json(row["plan"]) for row in rows]
    coded = [sample for sample in plans if any(isinstance(step, codecs.EnCodec) for step in sample.steps)]
    assert coded and all(sample.steps[-1].sha256 == encodec.sha256 for sample in coded)
    for stored, sample in zip(rows, plans, strict=True):
        assert stored["audio"] == samples.make_sample(sample)[0].tobytes()  # this holds on a CPU
    run = storage.read_json(f"{tmp_path}/run/run.json")
    assert run["configuration"]["recipe"]["assets"] == {"encodec": encodec._asdict()}
    with pytest.raises(RunError, match=r"(?s)recipe\.assets\.encodec\.sha256.*recipe\.assets\.encodec\.source"):
        other = small_models.encodec(tmp_path / "other", seed=1)
        pseudolabel.run(changed(config, assets={"encodec": other}))


def test_options_may_be_repeated(clips: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And are not taken in another way: of `--without a b` the second would be taken for something else."""
    command = ["recipe", "listen", "paper", "--clips", clips, "--out", f"{tmp_path}/x.wav"]
    given = ["--without", "codecs.encodec", "--without", "denoisers.demucs", "--assets", "nsnet2", "/a"]
    assert cli.main([*command, *given, "--assets", "deepfilternet3", "/b"]) == 1
    error = capsys.readouterr().err
    assert "/a does not exist" in error and "/b does not exist" in error
    assert "codecs.encodec" not in error and "denoisers.demucs" not in error
    with pytest.raises(SystemExit):
        cli.main([*command, "--without", "codecs.encodec", "denoisers.demucs"])


@pytest.mark.parametrize("lpcnet", [False, True])
@pytest.mark.parametrize("cpus", [2, 8, 96])
@pytest.mark.parametrize(("gpus", "actors"), [(0, None), (1, None), (1, 2), (2, 3), (8, None)])
def test_the_pools_of_networks_fit_any_machine(lpcnet: bool, cpus: int, gpus: int, actors: int | None) -> None:
    stages = job.stages(prepared(paper(lpcnet)), Pools(network_actors=actors), cpus, gpus)
    flow.check_pools(stages, cpus, gpus)
    names = ["degrade", "network 1", "degrade 2", *(["network 2", "degrade 3"] if lpcnet else []), "teach"]
    assert [stage.name for stage in stages] == names
    shares = [stage.pool.num_gpus for stage in stages if not stage.name.startswith("degrade")]
    assert len(set(shares)) == 1 and (shares[0] > 0) == bool(gpus)
    heavy = sum(stage.pool.actors for stage in stages if stage.pool.num_gpus)
    assert not gpus or gpus * int(1 / shares[0] + 1e-3) >= heavy, "some have room on no GPU"


def test_gpus_are_shared_equally_with_networks() -> None:
    with pytest.raises(RunError, match="--teach-gpus cannot be given"):
        job.stages(prepared(paper()), Pools(teach_gpus=0.5), 8, 1)


def test_a_node_without_texts_cannot_start(clips: str, tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader", reason='pip install "speechdistill[demo]"')
    (tmp_path / "en.txt").write_text("One sentence.\n")
    recipe = with_assets(chosen("weights_free", (), {"texts": str(tmp_path)}))
    samples.Degrade(clips, recipe, 0, "pcm16", False, samples.libraries(recipe))
    (tmp_path / "en.txt").write_text("Another one.\n")
    sentences.sentences.cache_clear()
    with pytest.raises(ValueError, match="has changed since the run was started"):
        samples.Degrade(clips, recipe, 0, "pcm16", False, samples.libraries(recipe))
    (tmp_path / "en.txt").write_text("12 34\n")
    recipe = with_assets(chosen("weights_free", (), {"texts": str(tmp_path)}))
    with pytest.raises(ValueError, match="hardly a word"):
        Plans(recipe, Clips.read(clips), 0)


def test_missing_weights_stop_the_job_before_any_work(
    clips: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["pseudolabel", "--clips", clips, "--out", f"{tmp_path}/out", "--recipe", "paper"]
    assert cli.main([*command, "--assets", "encodec", f"{tmp_path}/none"]) == 1
    error = capsys.readouterr().err
    assert f"codecs.encodec: {tmp_path}/none does not exist" in error and "denoisers.nsnet2: " in error
    assert "generated.text_to_speech: no Coqui TTS" in error and "--assets texts PATH" in error
    assert "recipe 'weights_free' works without them; --without" in error
    assert not (tmp_path / "out").exists()
