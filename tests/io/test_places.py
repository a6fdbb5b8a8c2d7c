"""The one walk over files: links, loops, hidden files, odd names, and what is said of those left out."""

import os
import subprocess
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from speechdistill.io import places
from speechdistill.io.places import HIDDEN, Seen, Skipped

ODD = [
    "a::b.wav",
    "a#1&2.wav",
    "what?.wav",
    "100%.wav",
    "*.wav",
    "take[1].wav",
    "new\nline.wav",
    " blank .wav",
    "x.wav ",
]
ODD += ["caf\udce9.wav", "a.b.c.WAV", "A.wav", "a.wav", "-o.wav", "~.wav", "{a,b}.wav", "c:.wav", "é" * 100 + ".wav"]


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def walked(root: Path, seen: Seen | None = None) -> tuple[list[str], Skipped]:
    skipped = Skipped()
    found = places.below(str(root), places.is_audio, skipped, seen)
    return [str(Path(path).relative_to(root)) for path in found], skipped


def globbed(root: Path, pattern: str) -> tuple[list[str], Skipped]:
    skipped = Skipped()
    found = places.matches(f"{root}/{pattern}", places.is_audio, skipped)
    return [str(Path(path).relative_to(root)) for path in found], skipped


def test_links_are_followed_each_file_is_taken_once_and_loops_end(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    touch(root / "real.wav", root / "deep" / "d.wav", outside / "far" / "o.wav", root / ".store" / "blob.wav")
    (root / "hard.wav").hardlink_to(root / "real.wav")
    for link, target in {
        "again.wav": "real.wav",
        "annexed.wav": ".store/blob.wav",
        "annexed2.wav": ".store/blob.wav",
        "linked": outside,
        "one": "deep",
        "o.wav": outside / "far" / "o.wav",
        "gone.wav": "nothing.wav",
        "self.wav": "self.wav",
        "deep/loop": root,
        "deep/loop2": "..",
    }.items():
        (root / link).symlink_to(target)
    os.mkfifo(root / "pipe.wav")
    told = ["gone.wav", "hard.wav"]  # what is no file is taken, too: reading it says why it has no score
    found, skipped = walked(root)
    assert found == ["annexed.wav", *told, "o.wav", "pipe.wav", "real.wav", "self.wav", "deep/d.wav"]
    assert skipped == {
        "(folder that is walked already)": 3,
        "(link to a file that is taken already)": 3,
        HIDDEN: 1,
    }
    assert sorted(globbed(root, "**")[0]) == sorted(globbed(root, "**/*.wav")[0]) == sorted(found)
    assert globbed(root, "o*/../*.wav")[0] == []


def test_several_roots_give_each_file_once(tmp_path: Path) -> None:
    touch(tmp_path / "a" / "x.wav", tmp_path / "b" / "y.wav")
    (tmp_path / "a" / "link").symlink_to(tmp_path / "b")
    seen = Seen()
    assert walked(tmp_path / "a", seen)[0] == ["x.wav", "link/y.wav"]
    assert walked(tmp_path / "b", seen)[0] == []


def test_hidden_and_system_files_are_skipped_counted_and_named(tmp_path: Path) -> None:
    root = tmp_path / ".hidden"
    names = "._a.wav .b.wav .git/c.wav __MACOSX/d.wav @eaDir/e.wav $RECYCLE.BIN/f.wav lost+found/g.wav Thumbs.db"
    touch(*(root / name for name in f"a.wav notes.txt more.TXT {names} x/.DS_Store".split()))
    found, skipped = walked(root)
    assert found == ["a.wav"], "a root that is hidden itself was named by the user"
    assert skipped == {HIDDEN: 9, ".txt": 2}
    hidden, text = skipped.lines()
    assert hidden.startswith("skipped (hidden or system) × 9: '") and hidden.endswith(", ...")
    assert text == f"skipped .txt × 2: '{root}/more.TXT', '{root}/notes.txt'"
    assert globbed(root, "*/*")[0] == [] and globbed(root, "*/*")[1][HIDDEN] == 6
    assert globbed(root, ".*")[0] == ["._a.wav", ".b.wav"]
    assert globbed(root, "*/../a.wav")[0] == []
    assert globbed(root, "**/@eaDir/*.wav")[0] == ["@eaDir/e.wav"]
    assert places.matches(f"{root}/.b.wav", places.is_audio, Skipped()) == [f"{root}/.b.wav"]


def test_any_character_may_stand_in_a_name(tmp_path: Path) -> None:
    root = tmp_path / "odd [1]::#*"
    touch(*(root / name for name in ODD))
    assert sorted(walked(root)[0]) == sorted(ODD)
    assert sorted(places.matches(str(root), places.is_audio, Skipped())) == sorted(f"{root}/{name}" for name in ODD)
    assert all(places.matches(f"{root}/{name}", places.is_audio, Skipped()) == [f"{root}/{name}"] for name in ODD)
    assert globbed(tmp_path, "odd*/[Aa].wav")[0] == [f"{root.name}/A.wav", f"{root.name}/a.wav"]


def test_a_tree_deeper_than_python_recurses_is_walked(tmp_path: Path) -> None:
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        for _ in range(1_200):
            Path("d").mkdir()
            os.chdir("d")
        Path("x.wav").touch()
        os.chdir(before)
        assert len(walked(tmp_path)[0]) == 1
    finally:
        os.chdir(before)
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil.rmtree is recursive, too


def test_one_line_names_what_is_skipped_whatever_its_name(tmp_path: Path) -> None:
    skipped, other = Skipped(), Skipped()
    skipped.add(".txt", "a\nb.txt")
    for name in ("caf\udce9.txt", "c", "d"):
        other.add(".txt", name)
    skipped.merge(other)
    assert skipped.lines() == [r"skipped .txt × 4: 'a\nb.txt', 'caf\udce9.txt', 'c', ..."]


@pytest.fixture
def memory() -> MemoryFileSystem:
    fs = fsspec.filesystem("memory")
    fs.rm("/walk", recursive=True) if fs.exists("/walk") else None
    for name in ("a.wav", "b/c.WAV", "b/._c.wav", ".git/d.wav", "b/e.txt", "b/x::y.wav", "b/q?1#2%20[1] .wav"):
        fs.pipe_file(f"/walk/{name}", b"x")
    return fs


def test_urls_are_walked_by_the_same_rule(memory: MemoryFileSystem) -> None:
    odd = {HIDDEN: 2, ".txt": 1, "(key with ::, which no URL can name)": 1}
    expected = ["memory:///walk/a.wav", "memory:///walk/b/c.WAV", "memory:///walk/b/q?1#2%20[1] .wav"]
    skipped = Skipped()
    assert sorted(places.below("memory://walk", places.is_audio, skipped)) == expected and skipped == odd
    for folder in ("memory://walk/", "memory://walk"):
        assert places.matches(folder, places.is_audio, Skipped()) == expected
    for file in ("memory://walk/b/e.txt", "memory://none", "https://host/folder/", "nothing://x/y"):
        assert places.matches(file, places.is_audio, Skipped()) == [file]
    skipped = Skipped()
    assert places.matches("memory://walk/**", places.is_audio, skipped) == expected and skipped == odd
    with pytest.raises(NotADirectoryError):
        list(places.below("memory://nowhere", places.is_audio, Skipped()))


def test_a_remote_folder_that_cannot_be_listed_is_an_error(
    memory: MemoryFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = memory.ls

    def ls(path: str, detail: bool = True) -> list:
        if path.endswith("/b"):
            raise PermissionError("denied")
        return real(path, detail=detail)

    monkeypatch.setattr(memory, "ls", ls)
    with pytest.raises(OSError, match="denied"):
        list(places.below("memory://walk", places.is_audio, Skipped()))
