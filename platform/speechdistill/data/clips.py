# data/: which clips there are (corpora/), and what sample i is (degradations/, recipes, plan).
"""The clip manifest as plans see it: three pools of clips, in manifest order, shared by the processes of a node.

They are an Arrow file, mapped and not read, so that ten million clips take no memory of a process's own.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from speechdistill.io import audio, file_cache, storage, table
from speechdistill.io.errors import TableError

_KINDS = ("speech", "noise", "rir")
# One record batch per kind, so that a column is one array: `large_string`, since 2 GiB are 22 million addresses.
_LAYOUT = pa.schema(
    [
        ("clip_id", pa.large_string()),
        ("uri", pa.large_string()),
        ("speaker", pa.large_string()),
        ("size_bytes", pa.int64()),
        ("etag", pa.large_string()),
        ("num_samples", pa.int64()),
        ("by_speaker", pa.int64()),  # positions in the order of speakers, unknown ones last
    ]
)
_SUFFIX = ".v1.arrow"  # of the layout
_COLUMNS = {
    **dict.fromkeys(("uri", "clip_id", "speaker", "etag"), pa.large_string()),
    "size_bytes": pa.int64(),
    "duration_s": pa.float64(),
}
_SAMPLED = 1000  # clips of a pool that are looked at for other files of a storage


def clip_id(kind: str, uri: str) -> str:
    """16 hexadecimal digits that depend on the kind and the address alone."""
    return hashlib.blake2b(f"{kind}\0{uri}".encode(errors="surrogatepass"), digest_size=8).hexdigest()


class Clip(NamedTuple):
    """One file; `num_samples` is its length at 16 kHz, `size_bytes` and `etag` its version when it was ingested."""

    clip_id: str
    uri: str
    num_samples: int
    speaker: str | None
    size_bytes: int | None
    etag: str | None


class Pool:
    """The clips of one kind, in manifest order; rows stay in Arrow memory, or in the mapped file, until asked for."""

    def __init__(self, rows: pa.RecordBatch) -> None:
        self._clip_ids, self._uris, self._speakers, self._sizes, self._etags, num_samples, by_speaker = rows.columns
        self.num_samples: np.ndarray = num_samples.to_numpy()
        self._by_speaker: np.ndarray = by_speaker.to_numpy()

    def __len__(self) -> int:
        return len(self.num_samples)

    def __getitem__(self, index: int) -> Clip:
        return Clip(
            self._clip_ids[index].as_py(),
            self._uris[index].as_py(),
            int(self.num_samples[index]),
            self._speakers[index].as_py(),
            self._sizes[index].as_py(),
            self._etags[index].as_py(),
        )

    def find(self, clip_id: str) -> Clip | None:
        """The clip of that id, if it is here; the first call sorts the ids of all."""
        ids, order = self._by_id
        place = int(np.searchsorted(ids, wanted := np.uint64(int(clip_id, 16)), sorter=order))
        return self[int(order[place])] if place < len(ids) and ids[order[place]] == wanted else None

    @cached_property
    def _by_id(self) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([int(clip_id, 16) for clip_id in self._clip_ids.to_pylist()], np.uint64)
        return ids, np.argsort(ids)

    def of_speaker(self, speaker: str) -> np.ndarray:
        """The indices of a speaker's clips, ascending; found by bisection."""
        known = range(len(self) - self._speakers.null_count)
        speaker_at = lambda place: self._speakers[int(self._by_speaker[place])].as_py()  # noqa: E731
        first = bisect_left(known, speaker, key=speaker_at)
        return self._by_speaker[first : bisect_right(known, speaker, lo=first, key=speaker_at)]

    def uris(self, prefix: str) -> list[str]:
        """The addresses that start so, of `_SAMPLED` clips that are evenly spread over the pool."""
        places = np.unique(np.linspace(0, len(self) - 1, min(_SAMPLED, len(self))).astype(np.int64))
        return [uri for place in places.tolist() if (uri := self._uris[place].as_py()).startswith(prefix)]


class Clips:
    """A `clip.v1` manifest split by kind: `speech`, `noise` and `rir`."""

    def __init__(self, rows: pa.Table | Sequence[pa.RecordBatch]) -> None:
        if isinstance(rows, pa.Table):
            manifest = rows
            rows = _arranged(lambda columns: manifest.select(columns).to_batches())
        self.speech, self.noise, self.rir = map(Pool, rows)

    def others(self, uri: str, most: int) -> list[str]:
        """At most `most` other files of the storage (bucket, server, local disks) that has `uri`, far apart.

        Of a storage with less than a thousandth of many clips there may be none.
        """
        prefix = "".join(part + "/" for part in uri.split("/")[:3]) if "://" in uri else "/"
        found = [other for pool in (self.speech, self.noise, self.rir) for other in pool.uris(prefix) if other != uri]
        places = np.unique(np.linspace(0, len(found) - 1, min(most, len(found))).astype(np.int64))
        return [found[place] for place in places.tolist()]

    @classmethod
    def read(cls, uri: str) -> "Clips":
        """The clips of a manifest (Parquet), or of the copy that `share` has made of one.

        A local copy is mapped itself, anything else as a file on this node's disk, which its first process makes. Where
        there can be none, the clips fill memory of this process.
        """
        is_copy = uri.endswith(_SUFFIX)
        if is_copy and "://" not in uri:
            return cls._mapped(uri)
        on_node = file_cache.made(uri, _SUFFIX, partial(file_cache.fetch if is_copy else _convert, uri))
        if on_node:
            return cls._mapped(str(on_node))
        if not is_copy:
            return cls(table.read(uri, "clip.v1", ["kind", *_COLUMNS]))
        with storage.access(uri), storage.opened(uri) as file:
            return cls(_batches(pa.BufferReader(file.read())))

    @classmethod
    def _mapped(cls, path: str) -> "Clips":
        try:
            return cls(_batches(pa.memory_map(path)))
        except (pa.ArrowInvalid, OSError) as error:
            raise TableError(f"{path} is damaged or gone ({error})", "delete it and rerun the command") from error


def check_each_once(manifest: str) -> None:
    """Raise `TableError` if a manifest has a clip in two rows, as several manifests put together may have."""
    numbers = [np.zeros(0, ">u8")]
    with table.streamed(manifest, "clip.v1", ["clip_id"]) as batches:
        for batch in batches(["clip_id"]):  # 8 bytes a clip, and few strings at a time
            numbers.append(np.frombuffer(bytes.fromhex("".join(batch["clip_id"].to_pylist())), ">u8"))
    ordered = np.sort(np.concatenate(numbers))
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    if len(again):
        reason = f"{manifest} has {len(again):,} clips in a second row, {again[0]:016x} first"
        raise TableError(reason, "each would be labelled as often: remove those rows, or ingest into one folder")


def share(manifest: str, folder: str, sha256: str) -> str:
    """Make the copy of a manifest that processes map, in `folder`, unless it is there, and return its address.

    Its name has the manifest's `sha256`: that of another one is never taken for it. Where there can be none, it is the
    manifest's own address, and each node makes a copy of its own.
    """
    copy = f"{folder}/clips-{sha256[:16]}{_SUFFIX}"
    if "://" not in copy:
        return copy if file_cache.is_made(Path(copy), partial(_convert, manifest)) else manifest
    fs, there = storage.file_system(copy)
    with storage.access(copy):
        if fs.exists(there):
            return copy
        if (on_node := file_cache.made(manifest, _SUFFIX, partial(_convert, manifest))) is None:
            return manifest
        fs.put_file(str(on_node), there)  # in one put, or in parts that are joined at the end: whole or not at all
    return copy


def _convert(manifest: str, path: Path) -> None:
    with table.streamed(manifest, "clip.v1", ["kind", *_COLUMNS]) as batches:
        found = _arranged(batches)
    with pa.ipc.new_file(str(path), _LAYOUT) as file:
        for batch in found:
            file.write_batch(batch)


def _batches(source: pa.NativeFile) -> list[pa.RecordBatch]:
    file = pa.ipc.open_file(source)
    return [file.get_batch(number) for number in range(len(_KINDS))]


def _arranged(batches: Callable[[list[str]], Iterable[pa.RecordBatch]]) -> list[pa.RecordBatch]:
    """The rows of each kind in the layout; a pass for each column, of which the longest is in memory twice."""
    found: list[dict[str, pa.Array]] = [{} for _ in _KINDS]
    for name, kept in _COLUMNS.items():
        parts: list[list[pa.Array]] = [[pa.array([], kept)] for _ in _KINDS]
        for batch in batches(["kind", name]):
            for kind, part in zip(_KINDS, parts, strict=True):
                part.append(batch[name].filter(pc.equal(batch["kind"], kind)).cast(kept))
        for arrays in found:
            arrays[name] = pa.concat_arrays(parts.pop(0))
    return [_batch(arrays) for arrays in found]


def _batch(arrays: dict[str, pa.Array]) -> pa.RecordBatch:
    arrays["num_samples"] = pa.array(audio.num_samples(arrays.pop("duration_s").to_numpy()))
    arrays["by_speaker"] = pa.array(_sorted(arrays["speaker"]))
    return pa.RecordBatch.from_arrays([arrays[name] for name in _LAYOUT.names], schema=_LAYOUT)


def _sorted(texts: pa.Array) -> np.ndarray:
    """`pc.sort_indices`, faster where texts come often."""
    encoded = texts.dictionary_encode()
    ranks = np.empty(len(encoded.dictionary) + 1, np.int64)
    ranks[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(encoded.dictionary))
    ranks[-1] = len(encoded.dictionary)  # of null
    return np.argsort(ranks[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()], kind="stable")
