"""WebDataset tars, whose audio members are clips that are read in place, and patterns that name many files.

Members with one key (the name up to the first dot of its last part) that follow each other are a sample: the columns
that its `.json` member gives are those of its clips.
"""

import glob
import json
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

import fsspec

from speechdistill.data import corpus, listed
from speechdistill.io import audio_files, tar_files
from speechdistill.io.audio import EXTENSIONS
from speechdistill.io.errors import AudioError, TableError

_LOG = logging.getLogger(__name__)
_THREADS = 16  # a tar on an object store is one small request after another: mostly waiting
_BATCH_ROWS = 1_000
_SAMPLE_MEMBERS = 1_000  # a larger one is taken apart, so that memory stays bounded
_BLOCK_BYTES = 1 << 13  # holds a sample's .json and the header behind it
_MAX_JSON_BYTES = 1 << 20

_COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
_META = re.compile(r"__[^/]*__($|/)")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")

_IS_COMPRESSED = "compressed, so its members cannot be read by byte ranges"
_UNPACK = "unpack it (`gunzip`) to a plain .tar"
Row = dict[str, Any]
_Member = tuple[TarInfo, bytes | None]  # audio; or .json, with its bytes


def rows(lines: Iterable[Row], ignored: Counter[str], whole: set[tuple[str, str]]) -> Iterator[Row]:
    """The rows of `lines`, where one whose `uri` is a tar stands for all its audio members, in their order.

    Tars beside each other with more than 1,000 clips take turns, always in the same way. `ignored` counts what else
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
                    ignored.update(batch.ignored)
                    whole |= batch.whole
                    _warn(batch, unknown)
                    unknown |= batch.unknown
                    yield from batch.rows


def is_tar(uri: str) -> bool:
    """By its name; also for a compressed one, which is refused later."""
    path = _path(uri)
    return path.lower().endswith(".tar") or _COMPRESSED.search(path) is not None


def files(patterns: Sequence[str]) -> list[str]:
    """What paths, URLs, globs and braces (`{000..099}`, `{a,b}`) name, absolute and each once, in their order.

    Raises `TableError` naming files that are missing or compressed tars, and a glob without any match.
    """
    found = dict.fromkeys(file for pattern in patterns for file in _matches(pattern))
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
    ignored: Counter[str]
    unknown: set[str]
    whole: set[tuple[str, str]]


class _Tar:
    """A tar's rows in batches, each made by some thread."""

    def __init__(self, line: Row) -> None:
        self._line, self._uri = line, line["uri"]
        self._rows = self._read()
        self.stopped = False
        self._error: AudioError | None = None
        self._ignored: Counter[str] = Counter()
        self._unknown: set[str] = set()
        self._whole: set[tuple[str, str]] = set()

    def batch(self) -> _Batch:
        rows = list(islice(self._rows, _BATCH_ROWS))
        batch = _Batch(self._uri, rows, self._ignored, self._unknown, self._whole)
        self._ignored, self._unknown, self._whole = Counter(), set(), set()
        return batch

    def _read(self) -> Iterator[Row]:
        for _, sample in groupby(self._members(), lambda member: _key(member[0].name)):
            while members := list(islice(sample, _SAMPLE_MEMBERS)):
                yield from self._clips(members)
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
            extension = PurePosixPath(name).suffix.lower()
            if self.stopped:
                return
            if info.isdir() or name.startswith(".") or _META.match(info.name):
                continue
            if not info.isreg():
                self._ignored["(link in a tar)"] += 1
            elif name.partition(".")[2].lower() == "json":
                file.seek(info.offset_data)
                yield info, file.read(min(info.size, _MAX_JSON_BYTES + 1))
            elif extension in EXTENSIONS:
                yield info, None
            else:
                self._ignored[extension or "(none)"] += 1

    def _clips(self, sample: list[_Member]) -> Iterator[Row]:
        audio = [info for info, data in sample if data is None]
        texts = [data for _, data in sample if data is not None]
        if texts and not audio:
            self._ignored[".json without audio beside it"] += len(texts)
        line, wrong = self._line, None
        for text in texts:
            try:
                line = line | self._given(text)
            except TableError as error:
                wrong = f"its .json member: {error.reason}"
            except ValueError as error:
                wrong = f"its .json member is not a JSON object of at most 1 MiB ({audio_files.one_line(error)})"
        for info in audio:
            row = line | {"uri": tar_files.Member(self._uri, info.offset_data, info.size, info.name).uri}
            if problem := "a sparse member, which lies in the tar in pieces" if info.issparse() else wrong:
                row["error"] = AudioError(row["uri"], problem, "pack the tar again, or leave it out")
            yield row

    def _given(self, text: bytes) -> Row:
        if len(text) > _MAX_JSON_BYTES:
            raise ValueError("it is larger")
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(type(values).__name__)
        self._unknown |= {key for key in values if key not in corpus.columns() and not key.startswith("__")}
        return listed.normalised(corpus.given(values))


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


def _path(uri: str) -> str:
    """The part of a URL that ends in the file's own name: `zip://a.tar::s3://bucket/x.zip`, `https://host/a.tar?key=1`."""
    inner = next((part for part in uri.split("::") if "://" in part), uri)
    return inner.split("?")[0] if inner.startswith(("http://", "https://")) else inner


def _matches(pattern: str) -> list[str]:
    pattern = re.sub("^(file|local)://", "", pattern)
    if "://" not in pattern:
        pattern = str(Path(pattern).absolute())  # links stay: their targets may have other suffixes
        if Path(pattern).is_file():  # before globs: a file may be called `take[1].csv`
            return [pattern]
    names = list(dict.fromkeys(_unbraced(pattern)))
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(_found, names))
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


def _found(name: str) -> list[str] | str:
    """The files of a path, URL or glob, or what is wrong with it."""
    try:
        return (_of_url(name) if "://" in name else _of_path(name)) or f"{name!r} (no such file)"
    except FileNotFoundError:
        return f"{name!r} (no such file)"
    except Exception as error:  # storage plugins raise their libraries' own types
        return f"{name!r} ({type(error).__name__}: {audio_files.one_line(error)})"


def _of_path(name: str) -> list[str]:
    # Path.glob takes no absolute pattern.
    names = glob.iglob(name, recursive=True) if glob.has_magic(name) else [name]  # noqa: PTH207
    return sorted(name for name in names if Path(name).is_file())


def _of_url(name: str) -> list[str]:
    fs, path = fsspec.url_to_fs(name)
    fs.invalidate_cache()
    if "*" not in name:  # "?" and "[" stand in signed and IPv6 addresses
        return [name] if fs.info(path)["type"] == "file" else []
    archive = name[name.index("::") :] if "::" in name else ""  # zip://*.tar::s3://bucket/a.zip
    found = fs.glob(path, detail=True).items()
    return sorted(fs.unstrip_protocol(path) + archive for path, info in found if info["type"] == "file")
