"""Several teachers as one: their weighted mean, how far they disagree, and what it takes for a label."""

from pathlib import Path

import numpy as np
import pytest
import torch

from manifests import voice
from speechdistill.io import audio
from speechdistill.models.label import Label, Teacher
from speechdistill.models.load import load_teacher, teacher_names
from speechdistill.models.networks.conv_transformer import ConvTransformer, ConvTransformerConfig
from speechdistill.models.options import TeacherOptions
from speechdistill.models.student import save_student

RATE = audio.SAMPLE_RATE
WAVES = [voice(2.0), voice(9.5, seed=1), voice(0.5, seed=2)]


@pytest.fixture(scope="module")
def students(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three small students of random weights, who disagree."""
    folders = [str(tmp_path_factory.mktemp("students") / f"lr=0.{i}") for i in range(3)]
    for seed, folder in enumerate(folders):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            network = ConvTransformer(ConvTransformerConfig(max_channels=6, dim=8, heads=2, layers=1)).eval()
            with torch.no_grad():
                network.transformer_pool_attn.pool.linear3.weight.mul_(30)
            save_student(network, folder, {})
    return folders


def ensemble(members: dict[str, float]) -> Teacher:
    return load_teacher(
        "ensemble:" + ",".join(f"{name}={w}" for name, w in members.items()), TeacherOptions(device="cpu")
    )


def scores(name: str) -> np.ndarray:
    labels = load_teacher(name, TeacherOptions(device="cpu")).label(WAVES)
    return np.array([label.score for label in labels if isinstance(label, Label)])


def test_the_label_is_the_weighted_mean_and_the_disagreement_that_of_the_members(students: list[str]) -> None:
    weights = [5.0, 3.0, 2.0]
    by_member = np.array([scores(student) for student in students])
    labels = ensemble(dict(zip(students, weights, strict=True))).label(WAVES)
    for label, said in zip(labels, by_member.T, strict=True):
        assert isinstance(label, Label) and label.disagreement is not None
        assert label.score == pytest.approx(np.average(said, weights=weights), abs=1e-6)
        assert label.logit == pytest.approx(np.log((label.score - 1) / (5 - label.score)), abs=1e-9)
        variance = np.average((said - label.score) ** 2, weights=weights)
        assert label.disagreement == pytest.approx(np.sqrt(variance), abs=1e-6) and label.disagreement > 0.01


def test_its_hash_is_of_the_members_and_the_ratio_of_their_weights(students: list[str]) -> None:
    one, other, third = students
    teacher = ensemble({one: 0.7, other: 0.3})
    same = ensemble({other: 3, one: 7})
    assert (same.weights_hash, same.name) == (teacher.weights_hash, teacher.name)
    assert teacher.name == f"ensemble:{one}=0.7,{other}=0.3" and not teacher.intrusive
    hashes = {ensemble(members).weights_hash for members in ({one: 0.3, other: 0.7}, {one: 0.7, third: 0.3})}
    assert len(hashes | {teacher.weights_hash}) == 3


def test_a_wave_that_one_member_cannot_judge_has_that_reason(students: list[str]) -> None:
    waves = [WAVES[0], np.zeros(RATE, np.float32), WAVES[2]]
    results = ensemble({students[0]: 1, students[1]: 1}).label(waves)
    assert [isinstance(result, Label) for result in results] == [True, False, True]
    assert str(results[1]).startswith(f"{students[0]}: silent")

    pytest.importorskip("pesq", reason="its installation needs a C compiler")
    teacher = ensemble({students[0]: 3, "pesq_oracle": 1})
    short, good = teacher.label([voice(0.2), WAVES[0]], [voice(0.2), WAVES[0]])
    assert teacher.intrusive and str(short) == "pesq_oracle: 0.200 s; PESQ takes 0.25 to 20 s"
    assert isinstance(good, Label)
    assert good.score == pytest.approx(0.75 * scores(students[0])[0] + 0.25 * 4.6439, abs=1e-3)


def test_the_timeline_is_the_mean_of_the_members_or_none(students: list[str]) -> None:
    wave = np.concatenate([voice(8.0), np.zeros(20 * RATE, np.float32)])
    lines = [load_teacher(student, TeacherOptions(device="cpu")).timeline(wave) for student in students[:2]]
    timeline = ensemble({students[0]: 1, students[1]: 3}).timeline(wave)
    assert len(timeline) == 28 and timeline[-1] == (27.0, None)
    for (start_s, score), (_, one), (_, other) in zip(timeline, *lines, strict=True):
        expected = None if one is None or other is None else pytest.approx(0.25 * one + 0.75 * other, abs=1e-6)
        assert score == expected, start_s


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ensemble:", "'' in ensemble: is no new NAME=WEIGHT"),
        ("ensemble:distillmos=1", "has one member; give two"),
        ("ensemble:distillmos,pesq_oracle", "'distillmos' in ensemble:distillmos,pesq_oracle is no new NAME=WEIGHT"),
        ("ensemble:distillmos=1,distillmos=2", "'distillmos=2' in"),
        ("ensemble:distillmos=1,pesq_oracle=0", "a weight above 0"),
        ("ensemble:distillmos=1,pesq_oracle=nan", "a weight above 0"),
        ("ensemble:distillmos=1,nobody=2", "teacher 'nobody' is unknown"),
        ("distillmos=1,pesq_oracle=2", "or an ensemble: ensemble:distillmos=0.7"),
    ],
)
def test_another_text_is_refused_with_how_to_write_it(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_teacher(name)


def test_members_have_no_weights_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no weights; members have their released weights"):
        load_teacher("ensemble:distillmos=1,pesq_oracle=2", TeacherOptions(weights=str(tmp_path)))
    with pytest.raises(ValueError, match="takes no head"):
        load_teacher("ensemble:distillmos=1,pesq_oracle=2", TeacherOptions(head="head.pt"))
    assert "ensemble" not in teacher_names()
