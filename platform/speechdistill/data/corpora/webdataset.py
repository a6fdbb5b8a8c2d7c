"""WebDataset tars, whose audio members are clips that are read in place, and patterns that name many files.

Members with one key (the name up to the first dot of its last part) that follow each other are a sample: the columns
that its `.json` member gives are those of its clips. Where names have more dots, `a.b.json` gives those of `a.b.flac`
alone, above those of `a.json`. Members of one name in a sample are rejected: which labels are whose is unknown.
"""

import glob
import logging
import re
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import groupby, islice
from pathlib import Path, PurePosixPath
from tarfile import TarError, TarInfo
from typing import IO, Any, NamedTuple

from speechdistill.data import corpus, tar_json
from speechdistill.io import audio_files, places, storage, tar_files
from speechdistill.io.errors import AudioError, TableError
from speechdistill.io.places import Skipped

_LOG = logging.getLogger(__name__)
_THREADS = 16  # a tar on an object store is one small request after another: mostly waiting
_BATCH_ROWS = 1_000
_SAMPLE_MEMBERS = 1_000  # a larger one is taken apart, so that memory stays bounded
_BLOCK_BYTES = 1 << 13  # holds a sample's .json and the header behind it

_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_META = re.compile(r"__[^/]*__($|/)")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")

_IS_COMPRESSED = "compressed, so its members cannot be read by byte ranges"
_UNPACK = "unpack it (`gunzip`) to a plain .tar"
_TWICE = "several {} behind each other, so it is unknown which labels are whose"
Row = dict[str, Any]
_Member = tuple[TarInfo, bytes | None]  # audio; or .json, with its bytes


def rows(lines: Iterable[Row], skipped: Skipped, whole: set[tuple[str, str]]) -> Iterator[Row]:
    """The rows of `lines`, where one whose `uri` is a tar stands for all its audio members, in their order.

    Tars beside each other with more than 1,000 clips take turns, always in the same way. `skipped` counts what else
    they hold; `whole` gathers kind and uri of those that were read to their end. One that cannot be is a row with
    `error`, behind its good members.
    """
    unknown: set[str] = set()
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="tar") as threads:
        for tars, group in groupby(lines, lambda line: is_tar(line["uri"])):
            if not tars:
                yield from group
                continue
            with closing(_batches(map(_Tar, group), threads)) as batches:
                for batch in batches:
                    skipped.merge(batch.skipped)
                    whole |= batch.whole
                    _warn(batch, unknown)
                    unknown |= batch.unknown
                    yield from batch.rows


def is_tar(uri: str) -> bool:
    """By its name; also for a compressed one, which is refused later."""
    path = _path(uri)
    return path.lower().endswith(".tar") or _COMPRESSED.search(path) is not None


def files(patterns: Sequence[str], skipped: Skipped | None = None) -> list[str]:
    """What paths, URLs, globs and braces (`{000..099}`, `{a,b}`) name, absolute and each once, in their order.

    `skipped` counts what globs leave out. Raises `TableError` naming files that are missing or compressed tars, and a
    glob without any match.
    """
    skipped = Skipped() if skipped is None else skipped
    found = dict.fromkeys(file for pattern in patterns for file in _matches(pattern, skipped))
    if compressed := [file for file in found if _COMPRESSED.search(_path(file))]:
        raise TableError(f"{compressed[0]}: {_IS_COMPRESSED}", _UNPACK)
    return list(found)


def _warn(batch: "_Batch", told: set[str]) -> None:
    if new := sorted(batch.unknown - told):
        message = "%s: json keys %s are left out; known are %s"
        _LOG.warning(message, batch.uri, new, sorted(corpus.columns()))


class _Batch(NamedTuple):
    uri: str
    rows: list[Row]
    skipped: Skipped
    unknown: set[str]
    whole: set[tuple[str, str]]


class _Tar:
    """A tar's rows in batches, each made by some thread."""

    def __init__(self, line: Row) -> None:
        self._line, self._uri = line, line["uri"]
        self._rows = self._read()
        self.stopped = False
        self._error: AudioError | None = None
        self._skipped = Skipped()
        self._unknown: set[str] = set()
        self._whole: set[tuple[str, str]] = set()

    def batch(self) -> _Batch:
        rows = list(islice(self._rows, _BATCH_ROWS))
        batch = _Batch(self._uri, rows, self._skipped, self._unknown, self._whole)
        self._skipped, self._unknown, self._whole = Skipped(), set(), set()
        return batch

    def _read(self) -> Iterator[Row]:
        for _, sample in groupby(self._members(), lambda member: _key(member[0].name)):
            line, wrong = self._line, None
            for number, members in enumerate(_taken_apart(sample)):
                line, wrong = yield from self._clips(members, line, wrong, number == 0)
        if self._error:
            yield self._line | {"error": self._error}
        else:
            self._whole.add((self._line["kind"], self._uri))

    def _members(self) -> Iterator[_Member]:
        """Ends early, with `_error`, where the tar cannot be read: an exception would cost the sample before it."""
        try:
            if _COMPRESSED.search(_path(self._uri)):
                raise AudioError(self._uri, _IS_COMPRESSED, _UNPACK)
            self._line = self._line | {"etag": audio_files.version(self._uri)[1]}
            with closing(audio_files.open_file(self._uri, _BLOCK_BYTES)) as file:
                if file.read(2) == b"\x1f\x8b":
                    raise AudioError(self._uri, _IS_COMPRESSED, _UNPACK)
                yield from self._of_samples(file)
        except AudioError as error:
            self._error = error
        except TarError as error:
            reason = f"truncated or not a tar ({error}); what stands before is ingested"
            self._error = AudioError(self._uri, reason, audio_files.COPY)
        except Exception as error:  # storage plugins raise their libraries' own types
            self._error = audio_files.unreadable(self._uri, error)

    def _of_samples(self, file: IO[bytes]) -> Iterator[_Member]:
        """The audio members, and the json members with their bytes: read now, while their block is at hand."""
        for info in tar_files.index(file):
            name = PurePosixPath(info.name).name
            extension = places.extension(name)
            if self.stopped:
                return
            if info.isdir() or _META.match(info.name):
                continue
            if any(map(places.is_system, info.name.split("/"))):
                self._skip(places.HIDDEN, info)
            elif not info.isreg():
                self._skip("(link in a tar)", info)
            elif extension == ".json":
                file.seek(info.offset_data)
                yield info, file.read(min(info.size, tar_json.MAX_BYTES + 1))
            elif places.is_audio(name):
                yield info, None
            else:
                self._skip(extension or "(none)", info)

    def _skip(self, reason: str, info: TarInfo) -> None:
        self._skipped.add(reason, f"{self._uri}: {info.name}")

    def _clips(
        self, sample: list[_Member], line: Row, wrong: str | None, is_first: bool
    ) -> Generator[Row, None, tuple[Row, str | None]]:
        """The clips of a sample, or of a part; returns what its .json members give to all of it, for its next part."""
        audio = [info for info, data in sample if data is None]
        stems, repeated = {_stem(info.name) for info in audio}, _repeated(sample)
        own: dict[str, tuple[Row, str | None]] = {}
        for info, text in ((info, text) for info, text in sample if text is not None):
            stem = _stem(info.name)
            if not audio or (stem not in stems and stem != _key(info.name)):
                self._skip(".json without audio beside it", info)
            elif stem == _key(info.name):
                if not is_first:
                    self._skip(".json of more than 1,000 members before it", info)
                given, problem = self._given(info, text, repeated)
                line, wrong = line | given, problem or wrong
            else:
                own[stem] = self._given(info, text, repeated)
        for info in audio:
            given, problem = own.get(_stem(info.name), ({}, None))
            row = line | given | {"uri": tar_files.Member(self._uri, info.offset_data, info.size, info.name).uri}
            sparse = "a sparse member, which lies in the tar in pieces" if info.issparse() else None
            twice = _TWICE.format(info.name) if info.name in repeated else None
            if reason := sparse or twice or problem or wrong:
                row["error"] = AudioError(row["uri"], reason, "pack the tar again, or leave it out")
            yield row
        return line, wrong

    def _given(self, info: TarInfo, text: bytes, repeated: set[str]) -> tuple[Row, str | None]:
        """The columns that a .json member gives, or what is wrong with it."""
        if info.name in repeated:
            return {}, _TWICE.format(info.name)
        given, unknown, problem = tar_json.columns(text)
        self._unknown |= unknown
        return given, problem


def _repeated(sample: list[_Member]) -> set[str]:
    """Names that several members of a sample have."""
    return {name for name, count in Counter(info.name for info, _ in sample).items() if count > 1}


def _taken_apart(sample: Iterable[_Member]) -> Iterator[list[_Member]]:
    """A sample in parts of some 1,000 members; one that names with one stem share is split only if it is far larger."""
    part: list[_Member] = []
    for member in sample:
        is_new = not part or _stem(member[0].name) != _stem(part[-1][0].name)
        if len(part) >= (_SAMPLE_MEMBERS if is_new else 2 * _SAMPLE_MEMBERS):
            yield part
            part = []
        part.append(member)
    if part:
        yield part


def _batches(tars: Iterator[_Tar], threads: ThreadPoolExecutor) -> Generator[_Batch]:
    """Batch after batch from several tars in turn, each made while those before it are used."""
    waiting = deque((tar, threads.submit(tar.batch)) for tar in islice(tars, _THREADS))
    try:
        while waiting:
            tar, future = waiting.popleft()
            batch = future.result()
            more = [tar] if len(batch.rows) == _BATCH_ROWS else islice(tars, 1)
            waiting.extend((tar, threads.submit(tar.batch)) for tar in more)
            yield batch
    finally:  # the user stopped: the threads need not come to the ends of their batches
        for tar, _ in waiting:
            tar.stopped = True


def _key(name: str) -> str:
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _stem(name: str) -> str:
    return name.removesuffix(PurePosixPath(name).suffix)


def _path(uri: str) -> str:
    """The part of a URL that ends in the file's own name: `zip://a.tar::s3://bucket/x.zip`, `https://host/a.tar?key=1`."""
    inner = next((part for part in uri.split("::") if "://" in part), uri)
    return inner.split("?")[0] if inner.startswith(("http://", "https://")) else inner


def _matches(pattern: str, skipped: Skipped) -> list[str]:
    pattern = re.sub("^(file|local)://", "", pattern)
    if "://" not in pattern:
        pattern = str(Path(pattern).absolute())  # links stay: their targets may have other suffixes
        if Path(pattern).is_file():  # before globs: a file may be called `take[1].csv`
            return [pattern]
    names = list(dict.fromkeys(_unbraced(pattern)))
    with ThreadPoolExecutor(_THREADS) as threads:
        left_out = [Skipped() for _ in names]
        found = list(threads.map(_found, names, left_out))
    for part in left_out:
        skipped.merge(part)
    if problems := [problem for problem in found if isinstance(problem, str)]:
        which = f"{len(problems)} of the {len(names)} files of {pattern!r}, such as " if len(names) > 1 else ""
        raise TableError(f"{which}{', '.join(problems[:5])}", "correct --list")
    return [file for matches in found for file in matches]


def _unbraced(pattern: str) -> Iterator[str]:
    """`{08..10}` counts with zeros in front, as in a shell; other braces stay."""
    match = _BRACES.search(pattern)
    if not match:
        yield pattern
        return
    first, last, alternatives = match.groups()
    if alternatives is not None:
        choices: Iterable[str] = alternatives.split(",")
    else:
        width = max(len(first), len(last)) if any(n.startswith("0") and len(n) > 1 for n in (first, last)) else 0
        step = 1 if int(first) <= int(last) else -1
        choices = (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))
    for choice in choices:
        yield from _unbraced(pattern[: match.start()] + choice + pattern[match.end() :])


def _found(name: str, skipped: Skipped) -> list[str] | str:
    """The files of a path, URL or glob, or what is wrong with it."""
    try:
        return _files(name, skipped) or f"{name!r} (no such file)"
    except FileNotFoundError:
        return f"{name!r} (no such file)"
    except Exception as error:  # storage plugins raise their libraries' own types
        return f"{name!r} ({type(error).__name__}: {audio_files.one_line(error)})"


def _files(name: str, skipped: Skipped) -> list[str]:
    if "*" in name or ("://" not in name and glob.has_magic(name)):  # "?" and "[" stand in signed and IPv6 addresses
        return places.matches(name, lambda _: True, skipped)
    if "://" not in name:
        return [name] if Path(name).is_file() else []
    fs, path = storage.file_system(name)
    fs.invalidate_cache()
    return [name] if fs.info(path)["type"] == "file" else []
