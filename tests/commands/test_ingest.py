"""Ingest: manifests that grow, hostile folders, bounded memory."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from manifests import corpus, row, voice
from speechdistill.commands import ingest
from speechdistill.commands.ingest import Ingest
from speechdistill.data import manifest_parts
from speechdistill.data.clips import clip_id
from speechdistill.data.corpora import folder
from speechdistill.engine import cluster
from speechdistill.io import audio, audio_files, storage, table
from speechdistill.io.errors import RunError, UnreadableError, UserError
from speechdistill.io.lease import LeaseError


def manifest_of(out: Path) -> list[dict]:
    return table.read(f"{out}/clips.parquet", "clip.v1").to_pylist()


def rejects_of(out: Path) -> list[dict]:
    return table.read(f"{out}/rejects.parquet", "reject.v1").to_pylist()


def test_folders_become_a_manifest(tmp_path: Path, local_ray: None) -> None:
    root = corpus(tmp_path / "c")
    (root / "speech" / "transcript.txt").write_text("not audio")
    folders = {kind: (str(root / kind),) for kind in ("speech", "noise", "rir")}
    summary = ingest.run(Ingest(out=str(tmp_path / "m"), **folders))
    assert summary.clips == {"speech": 6, "noise": 1, "rir": 1}
    assert summary.ignored_extensions == {".txt": 1}
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


def test_speakers_are_in_the_names_of_folders(tmp_path: Path, local_ray: None) -> None:
    for name in ("p1/a.wav", "p1/b.wav", "p2/p3_c.wav"):
        (tmp_path / "speech" / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(tmp_path / "speech" / name, voice(1), 16000)
    config = Ingest(out=f"{tmp_path}/m", speech=(f"{tmp_path}/speech",), speaker_from="parent")
    ingest.run(config)
    assert [row["speaker"] for row in manifest_of(tmp_path / "m")] == ["p1", "p1", "p2"]
    with pytest.raises(UserError, match=r"--speaker-from '\(' is neither parent nor a regular expression"):
        ingest.run(replace(config, speaker_from="("))


@pytest.mark.parametrize(
    ("rule", "speaker"), [(None, None), ("parent", "p2"), (r"/(p\d+)_", "p3"), (r"p\d+(?=/)", "p2"), ("x(.)", None)]
)
def test_a_speaker_is_found_by_a_rule(rule: str | None, speaker: str | None) -> None:
    for uri in ("/data/p2/p3_c.wav", "s3://bucket/p2/p3_c.wav"):
        assert folder.speaker(uri, rule) == speaker


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
    summary = ingest.run(Ingest(out=str(tmp_path / "m"), list=(str(file),)))
    assert summary.lists == {"rows": 4, "files": 3, "scored": 1, "rejected": 1}
    speech, noise = manifest_of(tmp_path / "m")
    assert (speech["speaker"], speech["language"], speech["mos"], speech["votes"]) == ("anna", "de", 3.5, 8)
    assert speech["uri"] == str(tmp_path / "speech/v0.flac")
    assert (noise["kind"], noise["speaker"], noise["mos"]) == ("noise", None, None)
    messages = "\n".join(row["message"] for row in rejects_of(tmp_path / "m"))
    assert f"mos 'good' is not a number from 1 to 5 ({file}, line " in messages and "missing.flac" in messages


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


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "in_order", map)


def listed(folder: Path, lines: dict[str, str], header: str = "path,mos") -> Ingest:
    (folder / "l.csv").write_text("\n".join([header, *(f"{name},{rest}" for name, rest in lines.items())]))
    return Ingest(out=str(folder / "m"), list=(str(folder / "l.csv"),))


def parts(out: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in (out / "parts").iterdir()}


def test_labels_that_changed_are_updated_and_told(
    tmp_path: Path, without_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus(tmp_path)
    before, after = ({f"speech/v{i}.flac": f"{n}.{i + 1}" for i in range(3)} for n in (1, 4))
    ingest.command(listed(tmp_path, before))
    ids = {row["uri"]: row["clip_id"] for row in manifest_of(tmp_path / "m")}
    assert "updated" not in capsys.readouterr().out
    ingest.command(listed(tmp_path, after))
    assert "3 clips were updated: mos × 3\n" in capsys.readouterr().out
    rows = manifest_of(tmp_path / "m")
    assert [row["mos"] for row in rows] == [4.1, 4.2, 4.3]
    assert {row["uri"]: row["clip_id"] for row in rows} == ids
    written = parts(tmp_path / "m")
    assert ingest.run(listed(tmp_path, after)).changes == {} and parts(tmp_path / "m") == written
    assert ingest.run(listed(tmp_path, before)).changes == {"updated": 3, "mos": 3}
    assert [row["mos"] for row in manifest_of(tmp_path / "m")] == [1.1, 1.2, 1.3]


def test_every_label_and_the_length_are_compared_and_one_that_is_not_given_stays(
    tmp_path: Path, without_ray: None
) -> None:
    corpus(tmp_path)
    header = "path,mos,split,speaker,votes,system"
    lines = {"speech/v0.flac": "3,train,a,8,s", "speech/v1.flac": "3,train,a,8,s", "speech/v2.flac": "3,train,a,8,s"}
    ingest.run(listed(tmp_path, lines, header))
    lines |= {"speech/v0.flac": "3,test,b,9,t"}
    assert ingest.run(listed(tmp_path, lines, header)).changes == dict.fromkeys(
        ("updated", "split", "speaker", "votes", "system"), 1
    )
    soundfile.write(tmp_path / "speech" / "v1.flac", voice(9), 16000)
    folder = Ingest(out=str(tmp_path / "m"), speech=(str(tmp_path / "speech"),))
    changes = ingest.run(folder).changes  # whose name is a corpus, which the list did not give
    assert changes == {"updated": 3, "corpus": 3, "length": 1, "content": 1}
    rows = {Path(row["uri"]).name: row for row in manifest_of(tmp_path / "m")}
    assert len(rows) == 6 and rows["v1.flac"]["duration_s"] == 9.0
    assert [rows[f"v{i}.flac"]["split"] for i in range(4)] == ["test", "train", "train", None]
    assert ingest.run(folder).changes == {}


def test_a_file_of_the_same_size_and_length_has_changed_too(tmp_path: Path, without_ray: None) -> None:
    speech = corpus(tmp_path) / "speech"
    soundfile.write(speech / "a.wav", voice(2, seed=1), 16000)
    config = Ingest(out=str(tmp_path / "m"), speech=(str(speech),))
    ingest.run(config)
    soundfile.write(speech / "a.wav", voice(2, seed=2), 16000)
    assert ingest.run(config).changes == {"updated": 1, "content": 1}


def test_a_known_file_that_is_no_audio_any_more_leaves_the_manifest_until_it_is_mended(
    tmp_path: Path, without_ray: None, capsys: pytest.CaptureFixture[str]
) -> None:
    speech = corpus(tmp_path) / "speech"
    config = Ingest(out=str(tmp_path / "m"), speech=(str(speech),))
    ingest.run(config)
    (speech / "v2.flac").write_text("text")
    for told in ("1 clip was in the manifest and cannot be used any more", ""):
        ingest.command(config)
        assert told in capsys.readouterr().out
        assert len(manifest_of(tmp_path / "m")) == 5
        assert [row["id"] for row in rejects_of(tmp_path / "m")] == [clip_id("speech", str(speech / "v2.flac"))]
    soundfile.write(speech / "v2.flac", voice(2), 16000)
    assert ingest.run(config).changes == {}
    assert len(manifest_of(tmp_path / "m")) == 6 and rejects_of(tmp_path / "m") == []


def test_known_files_whose_storage_is_away_stay(
    tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    speech = corpus(tmp_path) / "speech"
    config = Ingest(out=str(tmp_path / "m"), speech=(str(speech),))
    ingest.run(config)
    before = manifest_of(tmp_path / "m")

    def away(uri: str) -> None:
        raise UnreadableError(uri, "cannot be read", "check it")

    monkeypatch.setattr(audio_files, "version", away)
    monkeypatch.setattr(audio, "probe", away)
    ingest.command(config)
    assert "6 clips were in the manifest and could not be read now" in capsys.readouterr().out
    assert manifest_of(tmp_path / "m") == before and rejects_of(tmp_path / "m") == []


def test_of_two_at_once_the_second_is_refused_and_nothing_is_lost(
    tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = corpus(tmp_path / "c")
    first, second = (Ingest(out=str(tmp_path / "m"), **{kind: (str(root / kind),)}) for kind in ("speech", "noise"))
    real = manifest_parts.commit

    def commit(*args: object) -> int:
        monkeypatch.setattr(manifest_parts, "commit", real)
        with pytest.raises(LeaseError, match=r"in use by `speechdistill ingest` on .* since"):
            ingest.run(second)
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(manifest_parts, "commit", commit)
    ingest.run(first)
    ingest.run(second)
    assert len(manifest_of(tmp_path / "m")) == 7
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "clips.parquet",
        "ingest.json",
        "parts",
        "rejects.parquet",
    ]


_MEMORY = """
import pathlib, sys
from milli_ingest import rows, probe
from speechdistill.commands import ingest
from speechdistill.data import manifest_parts
from speechdistill.engine import cluster
cluster.connect()
ingest.ingest_rows(rows(int(sys.argv[2])), sys.argv[1], probe)
found = manifest_parts.merge(sys.argv[1])["clips"]["speech"]
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
    found = [row["uri"] for chunk in manifest_parts.chunks(rows, str(tmp_path)) for row in chunk]
    assert sorted(found) == sorted({f"/{i}.wav" for i in order})


def test_copies_of_parts_under_other_names_double_no_clip(tmp_path: Path) -> None:
    rows = table.from_rows([row(f"/s/{i}.wav") for i in range(3)], "clip.v1")
    for name in ("clips-000000", "Copy of clips-000000", "old-clips-000001"):
        storage.publish(table.parquet_bytes(rows), f"{tmp_path}/parts/{name}.parquet")
    assert manifest_parts.merge(str(tmp_path))["clips"] == {"speech": 3}
    assert len(manifest_of(tmp_path)) == 3
