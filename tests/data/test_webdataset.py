"""WebDataset tars: indexed by their headers, read in place, and never the end of a large ingest."""

import io
import json
import os
import random
import shutil
import tarfile
import threading
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import IO, ClassVar

import fsspec
import numpy as np
import pytest
import soundfile
from fsspec.spec import AbstractBufferedFile, AbstractFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests import voice
from speechdistill.commands import ingest
from speechdistill.commands.ingest import Ingest
from speechdistill.data import file_patterns, headers, listed
from speechdistill.data.corpora import folder, listing, webdataset
from speechdistill.io import audio, audio_files, table, tar_files
from speechdistill.io.errors import AudioError, TableError
from speechdistill.io.places import Skipped


def sound(seconds: float = 0.5, seed: int = 0, form: str = "FLAC") -> bytes:
    data = io.BytesIO()
    soundfile.write(data, voice(seconds, seed=seed), 16000, format=form)
    return data.getvalue()


def pack(file: Path, members: list[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(file, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def columns(**values: object) -> bytes:
    return json.dumps(values).encode()


def rows_of(*tars: Path | str, ignored: Skipped | None = None, **line: str) -> list[dict]:
    lines = [{"kind": "speech", **line, "uri": str(tar)} for tar in tars]
    return list(webdataset.rows(lines, Skipped() if ignored is None else ignored, set()))


def names_of(rows: list[dict]) -> list[str]:
    members = [tar_files.parse(row["uri"]) for row in rows if "error" not in row]
    return [member.name for member in members if member]


def manifest_of(out: Path) -> list[dict]:
    return table.read(f"{out}/clips.parquet", "clip.v1").to_pylist()


def rejects_of(out: Path) -> list[dict]:
    return table.read(f"{out}/rejects.parquet", "reject.v1").to_pylist()


def test_tars_become_a_manifest_without_being_unpacked(tmp_path: Path, local_ray: None) -> None:
    waves = {f"utt{i}": sound(1 + i / 4, seed=i) for i in range(6)}
    for shard in range(2):
        members = []
        for i in range(3 * shard, 3 * shard + 3):
            members += [(f"utt{i}.flac", waves[f"utt{i}"]), (f"utt{i}.txt", b"text")]
            members += [(f"utt{i}.json", columns(speaker=f"s{i}", mos=3.5, kind="noise" if i == 5 else "speech"))]
        pack(tmp_path / f"shard-{shard:03}.tar", members)
    config = Ingest(out=str(tmp_path / "m"), list=(str(tmp_path / "shard-{000..001}.tar"),))
    summary = ingest.run(config)
    assert summary.clips == {"speech": 5, "noise": 1} and summary.ignored_extensions == {".txt": 6}
    clips = manifest_of(tmp_path / "m")
    for i, clip in enumerate(clips):
        tar = tmp_path / f"shard-00{i // 3}.tar"
        data = waves[f"utt{i}"]
        assert (clip["speaker"], clip["mos"], clip["size_bytes"]) == (f"s{i}", 3.5, len(data))
        assert clip["etag"] == audio_files.version(str(tar))[1]
        assert clip["uri"].startswith(f"{tar}#offset=") and clip["uri"].endswith(f"&member=utt{i}.flac")
        expected, _ = soundfile.read(io.BytesIO(data), dtype="float32")
        np.testing.assert_array_equal(audio.load(clip["uri"], 4000, 8000), expected[4000:12000])
    ingest.run(config)
    assert manifest_of(tmp_path / "m") == clips


def test_a_line_of_a_list_may_be_a_tar(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sample = [("a.flac", b""), ("a.json", columns(speaker="anna", text="hello", __key__="a", licence=None))]
    pack(tmp_path / "s.tar", [*sample, ("b.flac", b"")])
    (tmp_path / "list.csv").write_text("path,kind,speaker,licence\nx.wav,rir,,\ns.tar,noise,paul,CC0-1.0\ny.wav,,,\n")
    rows = list(webdataset.rows(listing.rows(str(tmp_path / "list.csv")), Skipped(), set()))
    said = [tuple(row.get(key) for key in ("kind", "speaker", "licence")) for row in rows]
    paul = ("noise", "paul", "CC0-1.0")
    assert said == [("rir", None, None), ("noise", "anna", "CC0-1.0"), paul, ("speech", None, None)]
    (warning,) = caplog.messages
    assert "JSON keys ['text'] are left out" in warning and str(tmp_path / "s.tar") in warning


def test_unknown_keys_are_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pairs = [(f"{i}.{what}", b'{"text": 1}' if what == "json" else b"") for i in range(9) for what in ("wav", "json")]
    rows_of(*(pack(tmp_path / f"{i}.tar", pairs) for i in range(40)))
    assert len(caplog.messages) == 1


NAMES = [
    "a.wav",
    "./b.wav",
    "folder.with.dots/c.wav",
    "x" * 150 + "/" + "y" * 120 + ".wav",
    "x" * 98 + ".wav",
    "ü" * 30 + ".wav",
    "語" * 60 + ".wav",
    "#offset=1&size=2&member=d.wav",
    "e #&?*%20::s3:\n.wav",
    "take.1.WAV",
]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_name_is_found_and_read(tmp_path: Path, form: int) -> None:
    fits = [name for name in NAMES if form != tarfile.USTAR_FORMAT or len(name.encode()) < 100]
    waves = {name: sound(0.1 + i / 100, seed=i, form="WAV") for i, name in enumerate(fits)}
    tar = pack(tmp_path / "some #1.tar", list(waves.items()), form)
    rows = rows_of(tar)
    assert names_of(rows) == fits
    for row, data in zip(rows, waves.values(), strict=True):
        with audio_files.source(row["uri"]) as source:
            assert source.read() == data
        assert audio.probe(row["uri"]).num_frames == len(soundfile.read(io.BytesIO(data))[0])


def test_what_is_no_clip_is_left_out_and_counted(tmp_path: Path) -> None:
    tar, ignored = tmp_path / "s.tar", Skipped()
    with tarfile.open(tar, "w") as file:
        for name, kind in [("d.wav", tarfile.DIRTYPE), ("l.wav", tarfile.SYMTYPE), ("h.wav", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.wav"
            file.addfile(info)
        for name in ("._a.wav", "x/.hidden.wav", "__MACOSX/._a.wav", "__meta__/a.wav", "a.cls", "README", "a.wav"):
            file.addfile(tarfile.TarInfo(name))
        sparse = tarfile.TarInfo("sparse.wav")
        sparse.type = tarfile.GNUTYPE_SPARSE
        file.addfile(sparse)
    good, bad = rows_of(tar, ignored=ignored)
    assert names_of([good]) == ["a.wav"]
    assert "sparse.wav': a sparse member" in str(bad["error"])
    assert ignored == {"(hidden or system)": 3, "(link in a tar)": 2, ".cls": 1, "(none)": 1}


def test_a_sample_is_the_members_with_one_key_beside_each_other(tmp_path: Path) -> None:
    def said(who: str) -> bytes:
        return columns(speaker=who)

    members = [("v1.0/a.json", said("1a")), ("v1.0/a.near.wav", b""), ("v1.0/a.far.wav", b""), ("v1.0/b.wav", b"")]
    members += [("v2.0/b.wav", b""), ("v2.0/b.json", said("2b")), ("a.wav", b""), ("a.json", said("a"))]
    ignored = Skipped()
    rows = rows_of(pack(tmp_path / "s.tar", [*members, ("b.json", said("b"))]), ignored=ignored)
    assert [row.get("speaker") for row in rows] == ["1a", "1a", None, "2b", "a"]
    assert ignored == {".json without audio beside it": 1}


def test_names_with_several_dots_keep_what_is_known_of_each(tmp_path: Path) -> None:
    names = ["235342 Track 2.0 (Clean)", "S_02.take1", "S_02.take2", "plain"]
    members = [(f"{name}.{end}", columns(mos=i + 1.0, speaker=f"spk{i}") if end == "json" else b"")
               for i, name in enumerate(names) for end in ("flac", "json")]  # fmt: skip
    shared = [
        ("x.json", columns(mos=2, speaker="all")),
        ("x.1.flac", b""),
        ("x.2.flac", b""),
        ("x.2.json", columns(mos=3)),
    ]
    skipped = Skipped()
    rows = rows_of(pack(tmp_path / "s.tar", [*members, *shared, ("x.meta.json", b"{")]), ignored=skipped)
    assert [(row["mos"], row["speaker"]) for row in rows[:4]] == [(i + 1.0, f"spk{i}") for i in range(4)]
    assert [(row["mos"], row["speaker"]) for row in rows[4:]] == [(2, "all"), (3, "all")]
    assert skipped == {".json without audio beside it": 1}
    assert skipped.names == {".json without audio beside it": [f"{tmp_path}/s.tar: x.meta.json"]}


def test_a_thousand_names_that_begin_alike_keep_what_is_known_of_each(tmp_path: Path) -> None:
    members = [
        (f"corpus.{i}.{end}", columns(mos=1 + i / 1_000) if end == "json" else b"")
        for i in range(1_001)
        for end in ("flac", "json")
    ]
    rows = rows_of(pack(tmp_path / "s.tar", [("corpus.json", columns(speaker="all")), *members], tarfile.USTAR_FORMAT))
    assert [row["mos"] for row in rows] == [1 + i / 1_000 for i in range(1_001)]
    assert {row["speaker"] for row in rows} == {"all"}
    skipped = Skipped()
    rows = rows_of(pack(tmp_path / "s.tar", [*members, ("corpus.json", b"{}")], tarfile.USTAR_FORMAT), ignored=skipped)
    assert len(rows) == 1_001 and skipped == {".json of more than 1,000 members before it": 1}


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\xff", b" " * (1 << 20) + b"{}"])
def test_a_sample_with_a_bad_json_is_rejected_alone(tmp_path: Path, text: bytes) -> None:
    bad, good = rows_of(pack(tmp_path / "s.tar", [("a.json", text), ("a.wav", b""), ("b.wav", b"")]))
    assert "a.wav': its .json member is not a JSON object" in str(bad["error"])
    assert "error" not in good


def test_what_a_json_says_of_scores_and_splits_follows_the_rules_of_lists(tmp_path: Path) -> None:
    texts = [b'{"mos": 9}', b'{"mos": NaN, "split": "TRAIN"}', b'{"mos": "3.5", "votes": 4.0, "split": "dev"}']
    members = [
        (f"{i}.{what}", text if what == "json" else b"") for i, text in enumerate(texts) for what in ("json", "wav")
    ]
    bad, unscored, good = rows_of(pack(tmp_path / "s.tar", members))
    assert "0.wav': its .json member: mos 9 is not a number from 1 to 5" in str(bad["error"])
    assert (unscored.get("mos"), unscored["split"]) == (None, "train")
    assert (good["mos"], good["votes"], good["split"]) == (3.5, 4, "validation")


def test_wherever_a_tar_is_cut_the_members_before_are_kept(tmp_path: Path) -> None:
    members = [(f"{'long' * 30 if i == 2 else i}.wav", bytes(700 * i)) for i in range(4)]
    data = pack(tmp_path / "s.tar", members).read_bytes()
    with tarfile.open(tmp_path / "s.tar") as tar:
        ends = [info.offset_data + info.size for info in tar]
    mark = ends[-1] // 512 * 512 + 512
    for cut in [*range(0, mark + 512, 128), *ends]:
        (tmp_path / "cut.tar").write_bytes(data[:cut])
        *good, last = rows_of(tmp_path / "cut.tar")
        assert len(names_of(good)) == sum(end <= cut for end in ends), cut
        assert str(tmp_path / "cut.tar") in str(last["error"]) and "truncated" in str(last["error"])
    (tmp_path / "cut.tar").write_bytes(data[: mark + 512])
    assert len(names_of(rows_of(tmp_path / "cut.tar"))) == 4


def test_a_corrupt_header_is_told_behind_the_members_before_it(tmp_path: Path) -> None:
    tar = pack(tmp_path / "s.tar", [("a.wav", bytes(600)), ("b.wav", bytes(600)), ("c.wav", bytes(600))])
    data = bytearray(tar.read_bytes())
    data[data.index(b"b.wav")] = 0xFF
    tar.write_bytes(data)
    good, bad = rows_of(tar)
    assert names_of([good]) == ["a.wav"] and "no valid header at byte 1536" in str(bad["error"])


HARMFUL = [b"\xff" * 12, b"\x80" + b"\x7f" * 11, b"77777777777\0", b"-0000000100\0", b"00000000000\0"]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 22), st.integers(0, 511), st.sampled_from([*b"\0\xff01257LKSgx", *HARMFUL]))))
def test_a_hostile_tar_never_raises(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int, int | bytes]]
) -> None:
    tar = tmp_path_factory.getbasetemp() / "hostile.tar"
    members = [(f"{'é' * 60}{i}.{what}", bytes(600)) for i in range(3) for what in ("wav", "json")]
    data = bytearray(pack(tar, members).read_bytes())
    for block, place, change in changes:
        header = data[512 * block : 512 * (block + 1)]
        if isinstance(change, bytes):
            header[124:136] = change  # the size
        else:
            header[place] = change
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[512 * block : 512 * (block + 1)] = header
    tar.write_bytes(data)
    for row in rows_of(tar):
        if "error" in row:
            assert "truncated or not" in str(row["error"]) or "member" in str(row["error"])


def test_bad_tars_cost_their_own_rows_only(tmp_path: Path, local_ray: None) -> None:
    pack(tmp_path / "good.tar", [("a.flac", sound())])
    pack(tmp_path / "empty.tar", [])
    (tmp_path / "text.tar").write_text("text")
    (tmp_path / "gzip.tar").write_bytes(b"\x1f\x8b\x08" + bytes(2000))
    (tmp_path / "x.tar.gz").write_bytes(b"\x1f\x8b\x08" + bytes(2000))
    (tmp_path / "folder.tar").mkdir()
    os.mkfifo(tmp_path / "fifo.tar")
    cut = pack(tmp_path / "cut.tar", [("b.flac", sound(seed=1)), ("c.flac", sound(seed=2))])
    whole = cut.read_bytes()
    cut.write_bytes(whole[: whole.index(b"c.flac") + 1000])
    names = ["text", "gzip", "x", "folder", "fifo", "cut", "none", "empty", "good"]
    (tmp_path / "l.csv").write_text("\n".join(["path", *(f"{name}.tar{'.gz' * (name == 'x')}" for name in names)]))
    config = Ingest(out=str(tmp_path / "m"), list=(str(tmp_path / "l.csv"),))
    ingest.run(config)
    assert [row["uri"].rpartition("=")[2] for row in manifest_of(tmp_path / "m")] == ["b.flac", "a.flac"]
    reasons = {Path(row["message"].split("'")[1]).name: row["message"] for row in rejects_of(tmp_path / "m")}
    wanted = {
        "text.tar": "not a tar",
        "gzip.tar": "compressed",
        "x.tar.gz": "gunzip",
        "folder.tar": "not a regular file",
        "fifo.tar": "not a regular file",
        "cut.tar": "ends inside 'c.flac'",
        "none.tar": "FileNotFoundError",
    }
    assert reasons.keys() == wanted.keys()
    for name, reason in wanted.items():
        assert reason in reasons[name]
    cut.write_bytes(whole)
    ingest.run(config)
    assert len(manifest_of(tmp_path / "m")) == 3
    assert len(rejects_of(tmp_path / "m")) == len(wanted) - 1, "a mended tar is still among the rejects"


def test_a_bad_member_is_named_with_its_tar(tmp_path: Path) -> None:
    data = sound(form="WAV")
    tar = pack(
        tmp_path / "s.tar", [("empty.wav", b""), ("cut.wav", data[:9000]), ("text.wav", b"text"), ("a.wav", data)]
    )
    reasons = ["empty file", "truncated", "not audio", None]
    for row, reason in zip(rows_of(tar), reasons, strict=True):
        if reason is None:
            audio.probe(row["uri"])
            continue
        with pytest.raises(AudioError, match=reason) as caught:
            audio.probe(row["uri"])
        assert f"{tar}#offset=" in str(caught.value) and "member=" in str(caught.value)


def test_a_tar_that_was_replaced_is_not_read_as_the_old_one(tmp_path: Path) -> None:
    first, second = sound(seed=1, form="WAV"), sound(seed=2, form="WAV")
    (row, _) = rows_of(pack(tmp_path / "s.tar", [("a.wav", first), ("b.wav", second)]))
    for members in ([("b.wav", second), ("a.wav", first)], [("a.wav", first[:-2])], [("a" * 99 + ".wav", first)], []):
        pack(tmp_path / "s.tar", members)
        with pytest.raises(AudioError, match="has changed since it was ingested"):
            audio.load(row["uri"])
    (tmp_path / "s.tar").unlink()
    with pytest.raises(AudioError, match="FileNotFoundError"):
        audio.load(row["uri"])


@given(st.lists(st.tuples(st.sampled_from(["read", "seek"]), st.integers(-30, 60), st.integers(0, 2)), max_size=20))
def test_a_section_is_a_file(calls: list[tuple[str, int, int]]) -> None:
    data = bytes(range(100))
    section = tar_files.Section(io.BytesIO(data), 20, 40)
    twin = io.BytesIO(data[20:60])
    for call, number, whence in calls:
        if call == "read":
            assert section.read(number) == twin.read(number)
        elif number + (0, twin.tell(), 40)[whence] >= 0:
            assert section.seek(number, whence) == twin.seek(number, whence)
        else:
            with pytest.raises(ValueError):
                section.seek(number, whence)
        assert section.tell() == twin.tell()


def test_other_names_with_a_hash_are_files(tmp_path: Path) -> None:
    for name in ("a#1.wav", "b#offset=1&size=2.wav", "c.tar#member=d.wav", "d#offset=-1&size=2&member=e.wav"):
        (tmp_path / name).write_bytes(sound(form="WAV"))
        assert tar_files.parse(str(tmp_path / name)) is None
        audio.probe(str(tmp_path / name))


@pytest.mark.parametrize("archive", ["zip", "tar"])
def test_fsspec_archives_are_read_too(tmp_path: Path, archive: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.flac").write_bytes(sound())
    file = shutil.make_archive(str(tmp_path / "x"), archive, tmp_path / "in", "a.flac")
    uri = f"{archive}://a.flac::{file}"
    assert not webdataset.is_tar(uri)
    assert audio.probe(uri).num_frames == 8000
    with pytest.raises(AudioError, match=r"b\.flac"):
        audio.probe(uri.replace("a.flac", "b.flac"))


def test_many_tars_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = random.Random(0)
    lines, expected = [], []
    for i in range(60):
        count = order.choice([0, 1, 7, 14, 30])
        lines.append(str(pack(tmp_path / f"{i}.tar", [(f"{i}-{j}.wav", b"") for j in range(count)])))
        expected += [f"{i}-{j}.wav" for j in range(count)]
    assert names_of(rows_of(*lines)) == expected
    monkeypatch.setattr(webdataset, "_BATCH_ROWS", 7)  # now the larger ones take turns
    names = names_of(rows_of(*lines))
    assert names == names_of(rows_of(*lines)) != expected
    assert sorted(names, key=lambda name: int(name.split("-")[0])) == expected


def test_stopping_does_not_wait_for_whole_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tar = pack(tmp_path / "s.tar", [(f"{i}.wav", b"") for i in range(40)])
    monkeypatch.setattr(webdataset, "_BATCH_ROWS", 20)
    index, stopped, seen = tar_files.index, threading.Event(), []

    def held(file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
        for number, info in enumerate(index(file)):
            if number == 30:  # within the second batch
                stopped.wait(60)
            seen.append(info.name)
            yield info

    monkeypatch.setattr(tar_files, "index", held)
    with ThreadPoolExecutor(1) as pool:
        batches = webdataset._batches(iter([webdataset._Tar({"uri": str(tar), "kind": "speech"})]), pool)
        assert len(next(batches).rows) == 20
        batches.close()
        stopped.set()
    assert 20 < len(seen) < 40


def test_memory_does_not_grow_with_the_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "_BATCH_ROWS", 200)
    ours = [tracemalloc.Filter(True, str(module.__file__)) for module in (tarfile, tar_files, webdataset)]
    held = []
    for count in (1_000, 4_000):
        tar = pack(tmp_path / f"{count}.tar", [(f"{i}.wav", b"") for i in range(count)], tarfile.USTAR_FORMAT)
        tracemalloc.start()
        for number, _ in enumerate(webdataset.rows([{"uri": str(tar), "kind": "speech"}], Skipped(), set())):
            if number == count - 450:  # before the last batch is asked for, with which the tar would be closed
                traces = tracemalloc.take_snapshot().filter_traces(ours).statistics("filename")
                held.append(sum(trace.size for trace in traces))
        tracemalloc.stop()
    assert 0 < held[1] < 2.5 * held[0]  # a batch or two, as it happens


def test_braces_and_globs_name_many_files(tmp_path: Path) -> None:
    for name in ("s-08.tar", "s-09.tar", "s-10.tar", "x.tar", "{a,b}.csv", "take[1].csv"):
        (tmp_path / name).touch()

    def found(*patterns: str) -> list[str]:
        return [Path(file).name for file in file_patterns.files([f"{tmp_path}/{pattern}" for pattern in patterns])]

    assert found("s-{08..10}.tar") == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert found("s-{10..09}.tar") == ["s-10.tar", "s-09.tar"]
    assert found("{x,s-{10,08}}.tar") == ["x.tar", "s-10.tar", "s-08.tar"]
    assert found("x.tar", "*.tar") == ["x.tar", "s-08.tar", "s-09.tar", "s-10.tar"]
    assert found("s-{0,1}*.tar") == ["s-08.tar", "s-09.tar", "s-10.tar"]
    assert found("{a,b}.csv", "take[1].csv") == ["{a,b}.csv", "take[1].csv"]
    (tmp_path / "odd{.csv").touch()
    assert found("od*{.csv") == ["odd{.csv"]  # unbalanced: not expanded
    (tmp_path / ".x.tar").touch()
    (tmp_path / "latest.tar").symlink_to("s-10.tar")
    skipped = Skipped()
    assert len(file_patterns.files([f"{tmp_path}/*.tar"], skipped)) == 4 and sum(skipped.values()) == 2
    assert file_patterns.files([f"file://{tmp_path}/x.tar"]) == [f"{tmp_path}/x.tar"]


def test_missing_and_compressed_files_are_told_before_the_work(tmp_path: Path) -> None:
    for name in ("s-1.tar", "x.tar.gz", "y.tgz"):
        (tmp_path / name).touch()
    for pattern, message in [
        ("s-{1..4}.tar", r"3 of the 4 files .*s-2\.tar' \(no such file\), .*s-3.*s-4"),
        ("none.csv", r"none\.csv' \(no such file\); correct --list"),
        ("*.none", "no such file"),
        ("", "no such file"),
        ("x.tar.gz", "x.tar.gz: compressed.*gunzip"),
        ("*.tgz", "y.tgz: compressed"),
    ]:
        with pytest.raises(TableError, match=message):
            ingest.run(Ingest(out=str(tmp_path / "m"), list=(f"{tmp_path}/{pattern}",)))
    with pytest.raises(TableError, match="nonsense"):
        file_patterns.files(["nonsense://a.tar"])
    assert not (tmp_path / "m").exists()


class Counted(AbstractFileSystem):
    """Local files by ranged requests, which it counts with their bytes, like an object store."""

    protocol = "counted"
    async_impl = True  # says that `cat_file` is one request
    requests: ClassVar[list[int]] = []

    def info(self, path: str, **kwargs: object) -> dict:
        return {"name": path, "size": Path(path).stat().st_size, "type": "file", "ETag": '"abc"'}

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **kwargs: object) -> bytes:
        data = Path(path).read_bytes()[start:end]
        self.requests.append(len(data))
        return data

    def _open(
        self, path: str, mode: str = "rb", block_size: int | None = None, **kwargs: object
    ) -> AbstractBufferedFile:
        return CountedFile(self, path, block_size=block_size)


class CountedFile(AbstractBufferedFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        return self.fs.cat_file(self.path, start, end)


@pytest.fixture
def requests() -> Iterator[list[int]]:
    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.requests.clear()
    yield Counted.requests


def test_only_the_bytes_that_are_needed_are_read(tmp_path: Path, requests: list[int]) -> None:
    members, data = [], sound(6, form="WAV")
    for i in range(50):
        members += [(f"{i}.wav", data), (f"{i}.json", columns(speaker=f"s{i}", text="x" * 999))]
    tar = pack(tmp_path / "s.tar", members)
    rows = rows_of(f"counted://{tar}")
    print("index:", len(requests), "requests,", sum(requests), "of", tar.stat().st_size, "bytes")
    assert [row["speaker"] for row in rows] == [f"s{i}" for i in range(50)]
    assert {row["etag"] for row in rows} == {"abc"}
    assert len(requests) <= 51 and sum(requests) < 0.05 * tar.stat().st_size
    requests.clear()
    wave = audio.load(rows[30]["uri"])
    print("a member of", len(data), "bytes:", requests)
    assert requests == [len(data) + 512], "the member with its header is one request"
    np.testing.assert_array_equal(wave, soundfile.read(io.BytesIO(data), dtype="float32")[0])


def test_a_section_of_a_long_member_is_not_all_of_it(tmp_path: Path, requests: list[int]) -> None:
    (row,) = rows_of(f"counted://{pack(tmp_path / 's.tar', [('long.wav', sound(120, form='WAV'))])}")
    requests.clear()
    audio.load(row["uri"], 60 * 16000, 16000)
    assert sum(requests) < 1_000_000 < row_size(row)


def row_size(row: dict) -> int:
    member = tar_files.parse(row["uri"])
    assert member
    return member.size


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[AbstractFileSystem]:
    """A bucket of a real S3 server."""
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    s3fs = pytest.importorskip("s3fs")
    server.start()
    host, port = server.get_host_and_port()
    settings = {"ENDPOINT_URL": f"http://{host}:{port}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b"}
    for name, value in {**settings, "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    store = s3fs.S3FileSystem()
    store.makedirs("bucket", exist_ok=True)
    yield store
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_lists_and_tars_on_s3(tmp_path: Path, s3: AbstractFileSystem) -> None:
    data = {name: sound(seed=i) for i, name in enumerate(["a.flac", "b.flac", "c.flac", "d.flac"])}
    for shard, name in enumerate(["a.flac", "b.flac"]):
        s3.pipe(f"bucket/train/shard-{shard:06}.tar", pack(tmp_path / "s.tar", [(name, data[name])]).read_bytes())
    s3.pipe({"bucket/lists/c.flac": data["c.flac"], "bucket/more/d.flac": data["d.flac"]})
    s3.pipe("bucket/lists/l.csv", b"path\nc.flac\n../more/./d.flac\n../train/shard-000001.tar\nnone.flac\n")
    config = Ingest(
        out=str(tmp_path / "m"),
        list=tuple(file_patterns.files(["s3://bucket/train/shard-{000000..000000}.tar", "s3://bucket/lists/*.csv"])),
    )
    lines = listed.merged(lambda: chain.from_iterable(map(ingest._lines, config.list)))
    rows = list(ingest._rows(config, lines, Skipped(), set(), Counter()))
    clips, rejects = (part.to_pylist() for part in headers.probed(rows, headers.clip)[:2])
    assert [clip["uri"].replace("=", "/").rpartition("/")[2] for clip in clips] == [
        "a.flac",
        "c.flac",
        "d.flac",
        "b.flac",
    ]
    assert clips[3]["etag"] == s3.info("bucket/train/shard-000001.tar")["ETag"].strip('"')
    assert clips[3]["size_bytes"] == len(data["b.flac"]) and "none.flac" in rejects[0]["message"]
    np.testing.assert_array_equal(
        audio.load(clips[3]["uri"]), soundfile.read(io.BytesIO(data["b.flac"]), dtype="float32")[0]
    )
    with pytest.raises(TableError, match=r"1 of the 3 files .*shard-000002.tar' \(no such file\)"):
        file_patterns.files(["s3://bucket/train/shard-{000000..000002}.tar"])
    assert file_patterns.files(["s3://bucket/*/*.tar"]) == [f"s3://bucket/train/shard-00000{i}.tar" for i in range(2)]
    s3.pipe("bucket/train/shard-000001.tar", b"changed")
    with pytest.raises(AudioError, match=r"shard-000001\.tar#offset"):
        audio.load(clips[3]["uri"])


def test_odd_keys_of_an_object_store_are_read_or_named(s3: AbstractFileSystem) -> None:
    keys = ["a.wav", "A.wav", "/empty.wav", "x//y.wav", "./f.wav", "../g.wav", "q?1#2%20*[1].wav", " k.wav "]
    left_out = ["i::j.wav", ".hid/m.wav", "__MACOSX/n.wav"]
    s3.pipe({f"bucket/c/{key}": key.encode() for key in [*keys, *left_out]})
    s3.call_s3("put_object", Bucket="bucket", Key="c/marker/")
    skipped = Skipped()
    found = [row["uri"] for row in folder.rows("s3://bucket/c", "speech", skipped)]
    assert sorted(found) == sorted(f"s3://bucket/c/{key}" for key in keys)
    assert skipped == {"(hidden or system)": 2, "(key with ::, which no URL can name)": 1}
    for uri in found:
        with audio_files.source(uri) as source:
            assert source.read().decode() == uri.removeprefix("s3://bucket/c/")
