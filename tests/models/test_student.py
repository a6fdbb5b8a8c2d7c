"""A student on disk."""

from pathlib import Path

import pytest
import torch

from speechdistill.io import storage
from speechdistill.io.errors import TableError
from speechdistill.models.networks.conv_transformer import ConvTransformer, ConvTransformerConfig
from speechdistill.models.student import load_student, save_student

TINY = ConvTransformerConfig(max_channels=4, stride_convs=4, dim=8, heads=2, layers=1)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    torch.manual_seed(0)
    save_student(ConvTransformer(TINY).double(), f"{tmp_path}/student", {"teacher": "x"})
    return f"{tmp_path}/student"


def test_a_student_comes_back_as_it_was(folder: str) -> None:
    torch.manual_seed(0)
    expected = ConvTransformer(TINY).double().float().state_dict()
    student = load_student(folder)
    assert student.provenance == {"teacher": "x"} and student.network.config == TINY and not student.network.training
    assert all(torch.equal(value, expected[key]) for key, value in student.network.state_dict().items())


def test_a_folder_without_a_student_is_named(tmp_path: Path) -> None:
    with pytest.raises(TableError, match=f"{tmp_path} holds no checkpoint"):
        load_student(str(tmp_path))


@pytest.mark.parametrize("damage", ["torn", "other size"])
def test_a_damaged_student_is_named_with_the_reason(folder: str, damage: str) -> None:
    if damage == "torn":
        path = Path(folder) / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-9])
    else:
        about = storage.read_json(f"{folder}/student.json")
        about["config"]["dim"] = 16
        storage.publish_json(about, f"{folder}/student.json")
    with pytest.raises(TableError, match=f"{folder} holds no checkpoint of this version"):
        load_student(folder)
