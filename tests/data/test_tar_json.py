"""Labels of samples in tars: those of the lists' rules, and never another sample's."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from speechdistill.data import tar_json
from speechdistill.data.corpora import webdataset
from speechdistill.io.places import Skipped


def rows_of(file: Path, members: list[tuple[str, dict[str, Any] | None]]) -> list[dict[str, Any]]:
    """The rows of a tar of `members`, name and JSON; None stands for audio, which is not read here."""
    with tarfile.open(file, "w") as tar:
        for name, values in members:
            data = b"" if values is None else json.dumps(values).encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return list(webdataset.rows([{"kind": "speech", "uri": str(file)}], Skipped(), set()))


def test_two_samples_of_one_name_do_not_share_the_labels_of_the_last(tmp_path: Path) -> None:
    """webdataset/webdataset#157 and #173: names that occur twice."""
    members = [(f"a.{end}", {"speaker": who} if end == "json" else None) for who in "xy" for end in ("flac", "json")]
    *twice, good = rows_of(tmp_path / "s.tar", [*members, ("b.flac", None), ("b.json", {"speaker": "z"})])
    assert len(twice) == 2 and all("several members a.flac in one sample" in str(row["error"]) for row in twice)
    assert good["speaker"] == "z"


@pytest.mark.parametrize("names", [("a.json", "a.json"), ("a.b.json", "a.b.json")])
def test_of_two_jsons_of_a_sample_none_is_taken(tmp_path: Path, names: tuple[str, str]) -> None:
    audio = names[0].replace("json", "flac")
    (row,) = rows_of(tmp_path / "s.tar", [(audio, None), *((name, {"mos": i + 1}) for i, name in enumerate(names))])
    assert f"several members {names[0]} in one sample" in str(row["error"])


def test_samples_whose_members_lie_apart_are_told(tmp_path: Path) -> None:
    """webdataset/webdataset#258, ray-project/ray#44068: labels behind all audio."""
    file, skipped = tmp_path / "s.tar", Skipped()
    rows_of(file, [("a.flac", None), ("b.flac", None), ("a.json", {"mos": 1}), ("b.json", {"mos": 2})])
    rows = list(webdataset.rows([{"kind": "speech", "uri": str(file)}], skipped, set()))
    assert len(rows) == 2 and skipped == {".json without audio beside it": 2}


def test_columns_in_any_case_are_those_of_lists() -> None:
    values, unknown, problem = tar_json.columns(b'{"MOS": "4,5", " Speaker ": 17.0, "text": "x", "__key__": 1}')
    assert values == {"mos": 4.5, "speaker": "17"} and unknown == {"text"} and problem is None


@pytest.mark.parametrize("text", ['{"mos": 1, "mos": 5}', '{"mos": 1, "MOS": 5}', "[" * 100_000])
def test_a_key_given_twice_is_a_fault(text: str) -> None:
    values, _, problem = tar_json.columns(text.encode())
    assert values == {} and problem and problem.startswith("its .json member")
