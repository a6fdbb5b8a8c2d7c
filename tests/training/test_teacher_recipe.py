"""Training a head on several listening tests: what bias-awareness recovers, and what ignoring the bias costs."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from small_models import speech_encoder as small_encoder
from speechdistill.data.label_scale import LabelTransform, Scale
from speechdistill.engine import shards
from speechdistill.io import table
from speechdistill.io.errors import TableError
from speechdistill.models.label import Label
from speechdistill.models.load import load_teacher
from speechdistill.models.networks import speech_encoder
from speechdistill.models.networks.conv_transformer import QualityHead
from speechdistill.models.options import TeacherOptions
from speechdistill.training.feature_batches import FeatureBatches
from speechdistill.training.lanes import share
from speechdistill.training.loop import Loop
from speechdistill.training.recipe import Around, Training
from speechdistill.training.recipes.teacher import (
    TRANSFORM,
    BiasAware,
    Plain,
    TeacherRecipe,
    TeacherTraining,
    universal,
)

TRUE = {"far": Scale(0.6, -0.9), "near": Scale(1.0, 0.0), "wide": Scale(1.6, 0.8)}
"""How listeners of three tests hear the same quality."""

DIM = 16


def quality(logits: np.ndarray, scale: Scale) -> np.ndarray:
    return np.asarray(1 + 4 / (1 + np.exp(-(scale.a * logits + scale.b))))


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> str:
    """600 clips of 6 frames, whose quality is a linear function of their mean hidden state."""
    rng = np.random.default_rng(0)
    rows = []
    direction = rng.standard_normal(DIM)
    for number in range(600):
        name = list(TRUE)[number % 3]
        hidden = rng.standard_normal((6, DIM)).astype("<f2")
        logit = float(hidden.astype(np.float64).mean(axis=0) @ direction)
        mos = float(quality(np.array(logit), TRUE[name]))
        split = "validation" if number % 4 == 3 else "train"
        about = {"clip_id": str(number), "dataset": name, "split": split, "mos": mos}
        rows.append({"number": number, **about, "num_frames": 6, "dim": DIM, "hidden": hidden.tobytes()})
    return written(tmp_path_factory.mktemp("features"), rows)


def written(folder: Path, rows: list[dict[str, object]]) -> str:
    """As `features.compute` leaves it."""
    layout = shards.Layout(
        out=str(folder),
        schema="feature.v1",
        id_column="number",
        num_ids=len(rows),
        rows_per_part=64,
        totals=lambda rows: {},
        row_group=1,
    )
    shards.claim(layout.out, {})
    block = table.from_rows(rows, "feature.v1").rename_columns({"number": "id"})
    for field in shards.REJECT:
        block = block.append_column(field, pa.nulls(len(block), field.type))
    shards.write_parts(block, layout)
    shards.finish(layout)
    shards.complete(folder, {})
    return str(folder)


class Linear(nn.Module):
    """A head for which the true quality is in reach."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, 1)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(features.sum(dim=1) / 6).squeeze(-1)
        return logits


class LinearRecipe(TeacherRecipe):
    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return BiasAware(Linear(), 3) if self._config.bias_aware else Plain(Linear())  # type: ignore[arg-type]


def trained(features: str, bias_aware: bool) -> tuple[LinearRecipe, nn.Module, dict[str, float]]:
    recipe = LinearRecipe(
        TeacherTraining(features=features, encoder="nowhere", encoder_sha256="0", layer=1, bias_aware=bias_aware)
    )
    loop = Loop(recipe, Training(steps=300, learning_rate=0.04, dtype="float64"))
    for _ in loop.run(300):
        pass
    return recipe, loop.network, loop.validate()


@pytest.fixture(scope="module")
def aware(features: str) -> tuple[LinearRecipe, nn.Module, dict[str, float]]:
    return trained(features, bias_aware=True)


def test_scales_are_recovered_as_far_as_they_can_be_known(aware: tuple[LinearRecipe, nn.Module, object]) -> None:
    """The head's own scale is free, so what is known is how one test's logits become another's."""
    recipe, network, _ = aware
    found = recipe._scales(network)
    for name in ("far", "wide"):
        slope, offset = between(found["near"], found[name])
        assert slope == pytest.approx(between(TRUE["near"], TRUE[name])[0], rel=0.05)
        assert offset == pytest.approx(between(TRUE["near"], TRUE[name])[1], abs=0.05)


def between(here: Scale, there: Scale) -> tuple[float, float]:
    """A logit heard in one test, as a line in what is heard in another."""
    return there.a / here.a, there.b - there.a / here.a * here.b


def test_the_universal_scale_is_that_of_the_validation_clips(aware: tuple[LinearRecipe, nn.Module, object]) -> None:
    recipe, network, _ = aware
    clips = [recipe.batches.clip(number) for number in recipe.batches.validation_numbers(0, 1)]
    features = torch.from_numpy(np.stack([clip.features for clip in clips])).double()
    with torch.inference_mode():
        logits = network.head(features).numpy()  # type: ignore[operator]
    keeps = recipe.validate(Around(0, network, {}), 0, 1).keeps
    assert Scale(**keeps) == universal(logits, np.array([clip.mos for clip in clips])) != Scale()


def test_datasets_are_drawn_by_their_size(features: str, tmp_path: Path) -> None:
    about = {"num_frames": 1, "dim": 2, "hidden": b"0000", "mos": 3.0}
    rows = [
        {"number": i, "clip_id": str(i), "dataset": "many" if i % 8 else "few", "split": "train", **about}
        for i in range(7_200 * 8 // 7)
    ]
    rows[-1]["split"] = "validation"
    batches = FeatureBatches(written(tmp_path, rows))
    drawn = [rows[batches._train[batches.draw(t, 0)]]["dataset"] for t in range(3_000)]
    few = batches.datasets.counts["few"]
    assert batches.datasets.counts["many"] > 7_000
    assert drawn.count("few") / len(drawn) == pytest.approx(few / (few + 7_000), abs=0.02)


def test_plain_training_is_worse_on_the_same_data(
    aware: tuple[object, object, dict[str, float]], features: str
) -> None:
    plain = trained(features, bias_aware=False)[2]
    assert aware[2]["mse"] < 0.01
    assert plain["mse"] > 5 * aware[2]["mse"] and plain["mse"] == plain["universal_mse"]


def test_the_universal_scale_is_within_a_percent_of_the_optimum() -> None:
    rng = np.random.default_rng(1)
    for a, b in ((0.4, 1.5), (1.0, 0.0), (3.0, -2.0)):
        logits = rng.normal(0.3, 1.2, 500)
        mos = np.clip(quality(logits, Scale(a, b)) + 0.3 * rng.standard_normal(500), 1, 5)

        def error(point: np.ndarray, logits: np.ndarray = logits, mos: np.ndarray = mos) -> float:
            return float(np.mean((quality(logits, Scale(np.exp(point[0]), point[1])) - mos) ** 2))

        found = universal(logits, mos)
        best = minimize(error, [np.log(a), b], method="Nelder-Mead", options={"xatol": 1e-8, "fatol": 1e-12}).fun
        assert error(np.array([np.log(found.a), found.b])) <= 1.01 * best


def test_scores_go_to_the_universal_scale_and_back() -> None:
    there = LabelTransform(TRUE, Scale(1.2, 0.3))
    for name, scale in TRUE.items():
        back = LabelTransform({name: there.universal}, scale)
        for mos in (1.5, 2.0, 3.3, 4.2):
            assert back(there(mos, name), name) == pytest.approx(mos, abs=1e-9)
        # What its listeners give for a logit becomes what the model predicts for it.
        assert there(float(quality(np.array(0.7), scale)), name) == pytest.approx(
            float(quality(np.array(0.7), there.universal)), abs=1e-9
        )


def test_batches_are_a_pure_function_of_seed_and_step(features: str) -> None:
    whole, again = FeatureBatches(features, seed=3), FeatureBatches(features, seed=3)
    first = next(whole.stream(5, 6, 0, 1)).parts[0]
    inputs = first.arrays["inputs"]
    assert inputs.shape == (12, 384, DIM) and inputs.dtype == np.float16
    assert not inputs[:, 6:].any()
    parts = [next(again.stream(5, 6, rank, 5)).parts[0] for rank in range(5)]
    assert [name for part in parts for name in part.ids] == first.ids
    np.testing.assert_array_equal(np.concatenate([part.arrays["inputs"] for part in parts]), inputs)
    assert [len(share(12, rank, 5)) for rank in range(5)] == [len(part.ids) for part in parts]
    rows = {name: (dataset, mos) for name, dataset, mos in zip(whole._ids, whole._names, whole._mos, strict=True)}
    names = whole.datasets.names
    assert [rows[i][0] for i in first.ids] == [names[number] for number in first.arrays["datasets"]]
    assert [rows[i][1] for i in first.ids] == first.arrays["targets"].tolist()
    assert next(FeatureBatches(features, seed=4).stream(5, 6, 0, 1)).parts[0].ids != first.ids


def test_a_checkpoint_is_a_teacher_that_scores_on_the_universal_scale(features: str, tmp_path: Path) -> None:
    place = small_encoder(tmp_path / "encoder", "wav2vec2", large=True)
    _, digest = speech_encoder.load(place, 2)
    recipe = TeacherRecipe(
        TeacherTraining(features=features, encoder=place, encoder_sha256=digest, layer=2, batch_size=2)
    )
    network = recipe.network()
    head: QualityHead = network.head  # type: ignore[assignment]
    recipe.save(Around(0, network, {}), f"{tmp_path}/best", vars(Scale(2.0, 0.5)))
    transform = LabelTransform.read(f"{tmp_path}/best/{TRANSFORM}")
    assert transform.universal == Scale(2.0, 0.5) and set(transform.datasets) == set(TRUE)
    wave = (0.1 * np.random.default_rng(0).standard_normal(20_000)).astype(np.float32)
    model = load_teacher(f"{tmp_path}/best", TeacherOptions(device="cpu"))
    (label,) = model.label([wave])
    with torch.inference_mode():
        encoder = speech_encoder.load(place, 2).encoder
        logit = head.eval()(speech_encoder.middle(*encoder(*encoder.prepared([wave]))))
    assert isinstance(label, Label)
    assert label.logit == pytest.approx(2 * float(logit) + 0.5, abs=1e-5)
    moved = (tmp_path / "encoder").rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError, match="encoder: no speech encoder there"):
        load_teacher(f"{tmp_path}/best", TeacherOptions(device="cpu"))
    assert load_teacher(f"{tmp_path}/best", TeacherOptions(weights=str(moved), device="cpu")).label([wave]) == [label]
    other = small_encoder(tmp_path / "other", "wav2vec2", large=True, seed=1)
    with pytest.raises(ValueError, match="other: not the encoder that the head"):
        load_teacher(f"{tmp_path}/best", TeacherOptions(weights=other, device="cpu"))


def test_unusable_features_say_why(features: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match="features are not complete"):
        FeatureBatches(str(tmp_path))
    rows = table.read(str(min(Path(features, "shards").iterdir())), "feature.v1")
    one_sided = [{**row, "split": "train"} for row in rows.to_pylist()[:3]]
    with pytest.raises(TableError, match="3 clips train, 0 validate"):
        FeatureBatches(written(tmp_path / "one-sided", one_sided))
