"""The footers of a run in one file: resumes open only the parts that it lacks, and never take it for a newer part."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from milli import COLUMNS, milli_flow
from speechdistill.engine import footers, parts, shards
from speechdistill.engine.footers import Footers, Part
from speechdistill.io import table

MEMORY = fsspec.filesystem("memory")
Read = list[str]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[Read]:
    """The names of the parts that are opened."""
    names, original = [], footers._read

    def noted(fs: object, out: str, file: footers.File) -> str:
        names.append(file.part)
        return original(fs, out, file)

    monkeypatch.setattr(footers, "_read", noted)
    monkeypatch.setattr(footers, "_SAVED", 4)  # parts
    yield names
    MEMORY.store.clear()


def commit(layout: shards.Layout, *numbers: int, message: str = "no") -> list[Part]:
    """Commit these parts, whose rows are all rejected with a message; their footers."""
    block = pa.concat_tables([parts.block(layout.ids(k)) for k in numbers])
    for name in shards.REJECT.names:
        block = block.set_column(block.column_names.index(name), name, pa.array([message] * len(block)))
    for name in COLUMNS:
        block = block.append_column(name, pa.nulls(len(block), table.schema("pseudolabel.v1").field(name).type))
    return [Part.from_json(text) for text in shards.write_parts(block, layout)["part"].to_pylist()]


@pytest.mark.parametrize("place", ["local", "memory://run"])
def test_a_resume_reads_only_footers_that_were_not_saved(place: str, read: Read, tmp_path: Path) -> None:
    layout = milli_flow(tmp_path if place == "local" else place, 90).layout  # 12 parts
    shards.claim(layout.out, {})
    here = Footers(layout.out)
    for footer in commit(layout, *range(10)):
        here.note(footer)  # saved with the fourth and the eighth
    missing, totals = shards.survey(layout)
    assert (missing, totals.rejected, sorted(read)) == ([10, 11], 80, [8, 9])
    commit(layout, *missing)
    shards.survey(layout)  # which saves those of the four that were not
    read.clear()
    assert shards.survey(layout)[1].rejected == 90 and not read
    shards.finish(layout)
    assert not read and len(table.read(f"{layout.out}/manifest.parquet", "shard.v1")) == 12


def test_parts_that_were_made_again_or_have_grown_are_read_anew(read: Read, tmp_path: Path) -> None:
    layout = milli_flow(tmp_path, 28).layout
    shards.claim(layout.out, {})
    commit(layout, *range(4))
    assert shards.survey(layout)[1].reasons == {"no.no": 28} and len(read) == 4
    commit(layout, 1, message="other")
    read.clear()
    assert shards.survey(layout)[1].reasons == {"no.no": 20, "other.other": 8} and read == [1]
    grown = replace(layout, num_ids=32)
    shards.reopen(grown)
    commit(grown, 3)
    read.clear()
    assert shards.survey(grown)[1].rejected == 32 and sorted(read) == [1, 3]  # two are too few to be saved


def test_a_gathered_file_that_is_damaged_is_as_none(read: Read, tmp_path: Path) -> None:
    layout = milli_flow(tmp_path, 32).layout
    shards.claim(layout.out, {})
    commit(layout, *range(4))
    shards.survey(layout)
    file = tmp_path / "footers.parquet"
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    read.clear()
    assert shards.survey(layout)[1].rejected == 32 and len(read) == 4
    assert len(file.read_bytes()) == len(whole)


def test_a_long_footer_is_read_whole(read: Read, tmp_path: Path) -> None:
    layout = milli_flow(tmp_path, 8).layout
    shards.claim(layout.out, {})
    commit(layout, 0, message="why " * 20_000)
    shards.finish(layout)
    rejects = table.read(f"{tmp_path}/rejects/rejects.parquet", "reject.v1").to_pylist()
    assert [row["message"] for row in rejects] == ["why " * 20_000] * 8
    assert not (tmp_path / "footers.parquet").exists(), "a small run needs none"


def test_the_footers_of_an_earlier_version_are_written_as_they_were() -> None:
    for file in (Path(__file__).parents[1] / "fixtures" / "446974e").rglob("part-*.parquet"):
        text = pq.read_metadata(file).metadata[b"part"].decode()
        assert Part.from_json(text).to_json() == text
        assert Part.from_json(replace(Part.from_json(text), run="a", size_bytes=5).to_json()).size_bytes == 5
