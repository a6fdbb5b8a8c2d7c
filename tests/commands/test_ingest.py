"""Ingest: manifests that grow, hostile folders, bounded memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from manifests import corpus, voice
from speechdistill.commands import ingest
from speechdistill.commands.ingest import Ingest
from speechdistill.data.clips import clip_id
from speechdistill.io import storage, table
from speechdistill.io.errors import RunError, UserError


def manifest_of(out: Path) -> list[dict]:
    return table.read(f"{out}/clips.parquet", "clip.v1").to_pylist()


def rejects_of(out: Path) -> list[dict]:
    return table.read(f"{out}/rejects.parquet", "reject.v1").to_pylist()


def test_folders_become_a_manifest(tmp_path: Path, local_ray: None) -> None:
    root = corpus(tmp_path / "c")
    (root / "speech" / "transcript.txt").write_text("not audio")
    folders = {kind: (str(root / kind),) for kind in ("speech", "noise", "rir")}
    summary = ingest.run(Ingest(out=str(tmp_path / "m"), **folders))
    assert summary["clips"] == {"speech": 6, "noise": 1, "rir": 1}
    assert summary["ignored_extensions"] == {".txt": 1}
    noise = next(row for row in manifest_of(tmp_path / "m") if row["kind"] == "noise")
    assert noise["uri"] == str(root / "noise" / "white.wav") and noise["corpus"] == "noise"
    assert (noise["duration_s"], noise["sample_rate"], noise["channels"]) == (5.0, 44100, 1)
    assert noise["size_bytes"] == (root / "noise" / "white.wav").stat().st_size


def test_a_second_run_adds_new_files_and_keeps_ids_and_order(tmp_path: Path, local_ray: None) -> None:
    speech, out = corpus(tmp_path / "c") / "speech", tmp_path / "m"
    (speech / "bad.wav").write_text("text")
    config = Ingest(out=str(out), speech=(str(speech),))
    ingest.run(config)
    before = manifest_of(out)
    assert len(before) == 6 and len(rejects_of(out)) == 1
    soundfile.write(speech / "a-new.wav", voice(2), 16000)
    soundfile.write(speech / "bad.wav", voice(2), 16000)
    ingest.run(config)
    after = manifest_of(out)
    assert after[:6] == before
    assert [Path(row["uri"]).name for row in after[6:]] == ["a-new.wav", "bad.wav"]
    assert rejects_of(out) == [], "a mended file is still among the rejects"
    ingest.run(config)
    assert manifest_of(out) == after


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_lists_carry_what_the_user_knows(tmp_path: Path, local_ray: None, suffix: str) -> None:
    corpus(tmp_path)
    lines = [
        {
            "path": "speech/v0.flac",
            "speaker": "anna",
            "language": "de",
            "mos": "3.5",
            "votes": "8",
            "extra": "x",
        },
        {"path": str(tmp_path / "noise/white.wav"), "kind": "noise", "speaker": "", "mos": ""},
        {"path": "speech/v1.flac", "mos": "good"},
        {"path": "speech/missing.flac"},
    ]
    file = tmp_path / f"list.{suffix}"
    columns = list(dict.fromkeys(key for line in lines for key in line))
    if suffix == "csv":
        rows = [",".join(line.get(c, "") for c in columns) for line in lines]
        file.write_text("\n".join([",".join(columns), *rows]))
    elif suffix == "jsonl":
        file.write_text("\n".join(json.dumps(line) for line in lines))
    else:
        import pandas

        pandas.DataFrame(lines).to_parquet(file)
    ingest.run(Ingest(out=str(tmp_path / "m"), list=(str(file),)))
    speech, noise = manifest_of(tmp_path / "m")
    assert (speech["speaker"], speech["language"], speech["mos"], speech["votes"]) == ("anna", "de", 3.5, 8)
    assert speech["uri"] == str(tmp_path / "speech/v0.flac")
    assert (noise["kind"], noise["speaker"], noise["mos"]) == ("noise", None, None)
    messages = "\n".join(row["message"] for row in rejects_of(tmp_path / "m"))
    assert "mos 'good' in its list is no number" in messages and "missing.flac" in messages


def test_a_kill_between_the_two_files_of_a_part_loses_nothing(
    tmp_path: Path, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, out = corpus(tmp_path / "c"), tmp_path / "m"
    real = storage.publish

    def killed(data: bytes, uri: str) -> None:
        if killed.calls == 1:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        killed.calls += 1  # type: ignore[attr-defined]
        real(data, uri)

    killed.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(storage, "publish", killed)
    with pytest.raises(KeyboardInterrupt):
        ingest.run(Ingest(out=str(out), speech=(str(root / "speech"),)))
    monkeypatch.undo()
    ingest.run(Ingest(out=str(out), noise=(str(root / "noise"),), speech=(str(root / "speech"),)))
    assert len(manifest_of(out)) == 7


def test_links_that_lead_back_are_followed_once(tmp_path: Path, local_ray: None) -> None:
    root = corpus(tmp_path / "c")
    for name in ("a", "b"):
        (root / "speech" / name).symlink_to(root / "speech")
    ingest.run(Ingest(out=str(tmp_path / "m"), speech=(str(root / "speech"),)))
    assert len(manifest_of(tmp_path / "m")) == 6


def test_a_bad_line_costs_its_row_only(tmp_path: Path, local_ray: None) -> None:
    corpus(tmp_path)
    lines = [
        {"path": "speech/v0.flac", "votes": 8.0, "speaker": 17},
        {"path": "speech/v1.flac", "votes": float("inf")},
        {"path": "speech/v2.flac", "mos": [3]},
        {"path": "\ud800.wav"},
        {"path": "speech/v3.flac", "votes": 2.5},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    ingest.run(Ingest(out=str(tmp_path / "m"), list=(str(tmp_path / "list.jsonl"),)))
    (good,) = manifest_of(tmp_path / "m")
    assert (good["votes"], good["speaker"]) == (8, "17")
    assert len(rejects_of(tmp_path / "m")) == 4


def test_a_file_given_twice_is_one_clip(tmp_path: Path, local_ray: None) -> None:
    speech = str(corpus(tmp_path / "c") / "speech")
    ingest.run(Ingest(out=str(tmp_path / "m"), speech=(speech, speech)))
    assert len(manifest_of(tmp_path / "m")) == 6


def test_names_that_break_tables_are_rejected_with_the_fix(tmp_path: Path, local_ray: None) -> None:
    folder = tmp_path / "s"
    folder.mkdir()
    soundfile.write(folder / "néwline\n.wav", voice(1), 16000)
    with open(os.fsencode(folder) + b"/latin-\xe9.wav", "wb") as file:  # noqa: PTH123
        file.write((folder / "néwline\n.wav").read_bytes())
    ingest.run(Ingest(out=str(tmp_path / "m"), speech=(str(folder),)))
    assert [Path(row["uri"]).name for row in manifest_of(tmp_path / "m")] == ["néwline\n.wav"]
    assert "not UTF-8" in rejects_of(tmp_path / "m")[0]["message"]


def test_nothing_usable_is_an_error_that_names_the_rejects(tmp_path: Path, local_ray: None) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "a.wav").write_bytes(b"")
    with pytest.raises(RunError, match=r"rejects\.parquet"):
        ingest.run(Ingest(out=str(tmp_path / "m"), speech=(str(tmp_path / "s"),)))
    with pytest.raises(UserError, match="nowhere is not a folder; give folders with --speech"):
        ingest.run(Ingest(out=str(tmp_path / "m"), speech=(str(tmp_path / "nowhere"),)))
    with pytest.raises(RunError, match="--speech DIR"):
        ingest.run(Ingest(out=str(tmp_path / "m")))


_MEMORY = """
import pathlib, sys
from milli_ingest import rows, probe
from speechdistill.commands import ingest
from speechdistill.engine import cluster
cluster.connect()
ingest.ingest_rows(rows(int(sys.argv[2])), sys.argv[1], probe)
found = ingest.merge(sys.argv[1])["clips"]["speech"]
# Not getrusage: its maximum is inherited from the process that started this one.
status = pathlib.Path("/proc/self/status").read_text()
print(found, status.split("VmHWM:")[1].split()[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_a_million_files(tmp_path: Path) -> None:
    peaks = {}
    for count in (100_000, 1_000_000):
        run = [sys.executable, "-c", _MEMORY, str(tmp_path / str(count)), str(count)]
        found, peak = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
        assert int(found) == count
        peaks[count] = int(peak)
    print("peak memory, KiB:", peaks)
    assert peaks[1_000_000] <= 1.2 * peaks[100_000]


def test_ids_depend_on_kind_and_address_only() -> None:
    assert clip_id("speech", "/a.wav") == "799f43688d38e7b3"  # published: must never change
    assert len({clip_id(kind, uri) for kind in ("speech", "noise") for uri in ("/a", "/b")}) == 4


def test_many_new_chunks_find_every_duplicate(tmp_path: Path) -> None:
    order = np.random.default_rng(0).integers(0, 7000, 20_000)
    rows = ({"uri": f"/{i}.wav", "kind": "speech"} for i in order)
    found = [row["uri"] for chunk in ingest._chunks(rows, str(tmp_path)) for row in chunk]
    assert sorted(found) == sorted({f"/{i}.wav" for i in order})
