# data/: the clips (corpora/), and the definition of sample i (degradations/, recipes, plan).
"""The clip manifest for plans: three pools of clips in manifest order, shared by the processes of a node.

The pools are a memory-mapped Arrow file, so that ten million clips take no private memory of a process.
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
# One record batch per kind, so that a column is one array. `large_string`, since 22 million addresses exceed 2 GiB.
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
_SUFFIX = ".v1.arrow"  # version of the layout
_COLUMNS = {
    **dict.fromkeys(("uri", "clip_id", "speaker", "etag"), pa.large_string()),
    "size_bytes": pa.int64(),
    "duration_s": pa.float64(),
}
_SAMPLED = 1000  # clips of a pool that are searched for other files of a storage


def clip_id(kind: str, uri: str) -> str:
    """Return 16 hexadecimal digits that depend only on kind and address."""
    return hashlib.blake2b(f"{kind}\0{uri}".encode(errors="surrogatepass"), digest_size=8).hexdigest()


class Clip(NamedTuple):
    """A file; `num_samples` is its length at 16 kHz, `size_bytes` and `etag` its version when it was ingested."""

    clip_id: str
    uri: str
    num_samples: int
    speaker: str | None
    size_bytes: int | None
    etag: str | None


class Pool:
    """The clips of one kind, in manifest order. Rows stay in Arrow memory or in the mapped file until requested."""

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
        """Return the clip of an id, if the pool has it; the first call sorts all ids."""
        ids, order = self._by_id
        place = int(np.searchsorted(ids, wanted := np.uint64(int(clip_id, 16)), sorter=order))
        return self[int(order[place])] if place < len(ids) and ids[order[place]] == wanted else None

    @cached_property
    def _by_id(self) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array([int(clip_id, 16) for clip_id in self._clip_ids.to_pylist()], np.uint64)
        return ids, np.argsort(ids)

    def of_speaker(self, speaker: str) -> np.ndarray:
        """Return the indices of a speaker's clips, ascending, by bisection."""
        known = range(len(self) - self._speakers.null_count)
        speaker_at = lambda place: self._speakers[int(self._by_speaker[place])].as_py()  # noqa: E731
        first = bisect_left(known, speaker, key=speaker_at)
        return self._by_speaker[first : bisect_right(known, speaker, lo=first, key=speaker_at)]

    def uris(self, prefix: str) -> list[str]:
        """Return the addresses with a prefix among `_SAMPLED` clips, evenly spread over the pool."""
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
        """Return at most `most` other files, far apart, of the storage (bucket, server, local disks) of `uri`.

        The result may be empty for a storage with less than a thousandth of the clips.
        """
        prefix = "".join(part + "/" for part in uri.split("/")[:3]) if "://" in uri else "/"
        others = [other for pool in (self.speech, self.noise, self.rir) for other in pool.uris(prefix) if other != uri]
        places = np.unique(np.linspace(0, len(others) - 1, min(most, len(others))).astype(np.int64))
        return [others[place] for place in places.tolist()]

    @classmethod
    def read(cls, uri: str) -> "Clips":
        """Open the clips of a manifest (Parquet), or of a copy of one made by `share`.

        A local copy is mapped. Otherwise the first process of this node makes a file on its disk, which is mapped. If
        that is impossible, the clips are read into memory.
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
    """Make a copy of a manifest for mapping in `folder`, unless it exists, and return its address.

    The name of the copy contains the manifest's `sha256`, so that it is never mistaken for another. If no copy can be
    made, return the address of the manifest: then each node makes a copy of its own.
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
        fs.put_file(str(on_node), there)  # atomic: one put, or a multipart upload
    return copy


def _convert(manifest: str, path: Path) -> None:
    with table.streamed(manifest, "clip.v1", ["kind", *_COLUMNS]) as batches:
        arranged = _arranged(batches)
    with pa.ipc.new_file(str(path), _LAYOUT) as file:
        for batch in arranged:
            file.write_batch(batch)


def _batches(source: pa.NativeFile) -> list[pa.RecordBatch]:
    file = pa.ipc.open_file(source)
    return [file.get_batch(number) for number in range(len(_KINDS))]


def _arranged(batches: Callable[[list[str]], Iterable[pa.RecordBatch]]) -> list[pa.RecordBatch]:
    """Return the rows of each kind in the layout, with a pass for each column; the longest is in memory twice."""
    kinds: list[dict[str, pa.Array]] = [{} for _ in _KINDS]
    for name, kept in _COLUMNS.items():
        parts: list[list[pa.Array]] = [[pa.array([], kept)] for _ in _KINDS]
        for batch in batches(["kind", name]):
            for kind, part in zip(_KINDS, parts, strict=True):
                part.append(batch[name].filter(pc.equal(batch["kind"], kind)).cast(kept))
        for arrays in kinds:
            arrays[name] = pa.concat_arrays(parts.pop(0))
    return [_batch(arrays) for arrays in kinds]


def _batch(arrays: dict[str, pa.Array]) -> pa.RecordBatch:
    arrays["num_samples"] = pa.array(audio.num_samples(arrays.pop("duration_s").to_numpy()))
    arrays["by_speaker"] = pa.array(_sorted(arrays["speaker"]))
    return pa.RecordBatch.from_arrays([arrays[name] for name in _LAYOUT.names], schema=_LAYOUT)


def _sorted(texts: pa.Array) -> np.ndarray:
    """Return `pc.sort_indices(texts)`, faster for repeated texts."""
    encoded = texts.dictionary_encode()
    ranks = np.empty(len(encoded.dictionary) + 1, np.int64)
    ranks[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(encoded.dictionary))
    ranks[-1] = len(encoded.dictionary)  # null sorts last
    return np.argsort(ranks[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy()], kind="stable")
