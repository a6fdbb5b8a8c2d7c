"""Batches of cached features. Like batches of audio (`batches.py`), they are a pure function of seed and step."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from speechdistill.data.scored_clips import Datasets
from speechdistill.engine import shards
from speechdistill.engine.finished_run import RowGroups
from speechdistill.io.errors import TableError, UserError
from speechdistill.models.networks.conv_transformer import FRAMES
from speechdistill.training.lanes import Batch, Part, read_ahead, rng, scored, share

_ABOUT = ["clip_id", "dataset", "split", "mos", "dim"]
_AGAIN = "delete it and rerun the command, which computes it again"
_THREADS = 32
_AHEAD_BYTES = 1 << 16  # bytes read from storage beyond those of a clip


class FeatureClip(NamedTuple):
    """A validation clip: name of its dataset, listeners' score, features (384, dim) float16."""

    dataset: str
    mos: float
    features: np.ndarray


class FeatureBatches:
    """Batches of features (batch, 384, dim) float16, zero-padded at the end, and of unmapped listeners' scores.

    Each lane draws a dataset with p in proportion to min(clips, 7000), then one of its clips. `out` is the folder that
    `features.compute` filled. Raises `TableError` if it is incomplete, or has no training or no validation clips.
    """

    def __init__(self, out: str, batch_size: int = 12, seed: int = 0) -> None:
        if seed < 0:
            raise UserError(f"Invalid seed {seed}", "use a seed of at least 0")
        if shards.completed(out) is None:
            raise TableError(f"{out}: features are not complete", "rerun the command")
        self.batch_size, self._seed = batch_size, seed
        self._groups = RowGroups(out, 1, _AGAIN, keeps_footers=True)
        self.fingerprint = self._groups.fingerprint
        clips = self._groups.columns(*_ABOUT)
        self._ids, self._mos = clips["clip_id"].to_pylist(), clips["mos"].to_numpy()
        self.dim = int(clips["dim"][0].as_py()) if len(clips) else 0
        self._readers = ThreadPoolExecutor(_THREADS)
        is_train = np.array(clips["split"].to_pylist()) == "train"
        self._train, self._validation = np.flatnonzero(is_train), np.flatnonzero(~is_train)
        if not len(self._train) or not len(self._validation):
            raise TableError(f"{out}: {len(self._train)} clips train, {len(self._validation)} validate", "give both")
        self._names: list[str] = clips["dataset"].to_pylist()
        self.datasets = Datasets([self._names[i] for i in self._train])

    def stream(self, start: int, stop: int, rank: int, world: int) -> Iterator[Batch]:
        """Yield a worker's share of batches `start` to `stop - 1`, read ahead on other threads."""
        lanes = share(self.batch_size, rank, world)
        return read_ahead(lambda t: Batch(t, (self.read([self.draw(t, lane) for lane in lanes]),)), range(start, stop))

    def draw(self, t: int, lane: int) -> int:
        """The number of the training clip in lane `lane` of batch t."""
        return self.datasets.draw(rng(self._seed, t, lane))

    def read(self, numbers: list[int]) -> Part:
        """The training clips `numbers`."""
        clips = self._train[numbers]
        features = np.zeros((len(clips), FRAMES, self.dim), np.float16)
        list(self._readers.map(self._read_into, features, clips))
        ids = [self._ids[i] for i in clips]
        return scored(features, self._mos[clips], self.datasets.of[numbers], ids, self.batch_size)

    def validation_numbers(self, rank: int, world: int) -> list[int]:
        """A worker's share of the validation clips."""
        return [int(number) for number in self._validation[rank::world]]

    def clip(self, number: int) -> FeatureClip:
        """Read a validation clip."""
        features = np.zeros((FRAMES, self.dim), np.float16)
        self._read_into(features, number)
        return FeatureClip(self._names[number], float(self._mos[number]), features)

    def _read_into(self, features: np.ndarray, clip: int) -> None:
        data = self._groups.read(clip, ["hidden"], _AHEAD_BYTES)["hidden"][0].as_buffer()
        hidden = np.frombuffer(data, "<f2").reshape(-1, self.dim)
        features[: len(hidden)] = hidden
