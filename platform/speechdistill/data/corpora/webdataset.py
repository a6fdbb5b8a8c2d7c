"""WebDataset tars: their audio members are clips, which are read in place.

Consecutive members with the same key (the name up to the first dot of its last part) are a sample. Its `.json` member
has the columns of its clips. If names have more dots, `a.b.json` has the columns of `a.b.flac` alone and overrides
`a.json`. Members of the same name in a sample are rejected, since their labels are ambiguous.
"""

import logging
import re
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import groupby, islice
from pathlib import PurePosixPath
from tarfile import TarError, TarInfo
from typing import IO, NamedTuple

from speechdistill.data import corpus, file_patterns, tar_json
from speechdistill.data.listed import Row
from speechdistill.io import audio_files, places, tar_files
from speechdistill.io.errors import AudioError
from speechdistill.io.places import Skipped

_LOG = logging.getLogger(__name__)
_THREADS = 16  # a tar on an object store is a series of small requests, mostly waiting
_BATCH_ROWS = 1_000
_SAMPLE_MEMBERS = 1_000  # larger samples are split, so that memory stays bounded
_BLOCK_BYTES = 1 << 13  # holds the .json of a sample and the next header

_META = re.compile(r"__[^/]*__($|/)")
_TWICE = "several members {} in one sample, so it is unknown which labels are whose"
_Member = tuple[TarInfo, bytes | None]  # the bytes of a .json member, None for audio


def rows(lines: Iterable[Row], skipped: Skipped, whole: set[tuple[str, str]]) -> Iterator[Row]:
    """Yield the rows of `lines`; a row whose `uri` is a tar is replaced by rows of its audio members, in their order.

    Consecutive tars of more than 1,000 clips take turns, in a deterministic order. `skipped` counts members that are
    not clips; `whole` collects kind and uri of the tars that were read to the end. A tar that cannot be read to the end
    yields a row with `error` after its good members.
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
    """Return whether the name is that of a tar. Compressed tars are refused later."""
    return file_patterns.path_of(uri).lower().endswith(".tar") or file_patterns.is_compressed(uri)


def _warn(batch: "_Batch", warned: set[str]) -> None:
    if new := sorted(batch.unknown - warned):
        message = "%s: JSON keys %s are left out; known are %s"
        _LOG.warning(message, batch.uri, new, sorted(corpus.columns()))


class _Batch(NamedTuple):
    """Rows of a tar, with the members skipped, unknown JSON keys and whole tars since the last batch."""

    uri: str
    rows: list[Row]
    skipped: Skipped
    unknown: set[str]
    whole: set[tuple[str, str]]


class _Tar:
    """The rows of a tar in batches; successive batches may be made by different threads."""

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
        """Yield members up to the first error, which is kept as `_error`: raised, it would lose the sample before."""
        try:
            if file_patterns.is_compressed(self._uri):
                raise AudioError(self._uri, file_patterns.COMPRESSED, file_patterns.UNPACK)
            self._line = self._line | {"etag": audio_files.version(self._uri)[1]}
            with closing(audio_files.open_file(self._uri, _BLOCK_BYTES)) as file:
                if file.read(2) == b"\x1f\x8b":
                    raise AudioError(self._uri, file_patterns.COMPRESSED, file_patterns.UNPACK)
                yield from self._of_samples(file)
        except AudioError as error:
            self._error = error
        except TarError as error:
            reason = f"truncated or not a tar ({error}); its members before the error are ingested"
            self._error = AudioError(self._uri, reason, audio_files.COPY)
        except Exception as error:  # storage plugins raise their libraries' own types
            self._error = audio_files.unreadable(self._uri, error)

    def _of_samples(self, file: IO[bytes]) -> Iterator[_Member]:
        """Yield audio members, and JSON members with their bytes, which are read while their block is in memory."""
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
        """Yield the clips of a part of a sample; return the columns that its .json members give to all later parts."""
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
            sparse = "a sparse member, which is stored in pieces" if info.issparse() else None
            twice = _TWICE.format(info.name) if info.name in repeated else None
            if reason := sparse or twice or problem or wrong:
                row["error"] = AudioError(row["uri"], reason, "pack the tar again, or leave it out")
            yield row
        return line, wrong

    def _given(self, info: TarInfo, text: bytes, repeated: set[str]) -> tuple[Row, str | None]:
        """Return the columns of a .json member, or what is wrong with it."""
        if info.name in repeated:
            return {}, _TWICE.format(info.name)
        given, unknown, problem = tar_json.columns(text)
        self._unknown |= unknown
        return given, problem


def _repeated(sample: list[_Member]) -> set[str]:
    """Return the names that several members of a sample have."""
    return {name for name, count in Counter(info.name for info, _ in sample).items() if count > 1}


def _taken_apart(sample: Iterable[_Member]) -> Iterator[list[_Member]]:
    """Split a sample into parts of about 1,000 members; members with the same stem are split above 2,000 only."""
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
    """Yield batches of several tars in turn, each made while the previous ones are used."""
    waiting = deque((tar, threads.submit(tar.batch)) for tar in islice(tars, _THREADS))
    try:
        while waiting:
            tar, future = waiting.popleft()
            batch = future.result()
            more = [tar] if len(batch.rows) == _BATCH_ROWS else islice(tars, 1)
            waiting.extend((tar, threads.submit(tar.batch)) for tar in more)
            yield batch
    finally:  # if the caller stops early, threads need not finish their batches
        for tar, _ in waiting:
            tar.stopped = True


def _key(name: str) -> str:
    """Return the name up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _stem(name: str) -> str:
    """Return the name without its last suffix."""
    return name.removesuffix(PurePosixPath(name).suffix)
