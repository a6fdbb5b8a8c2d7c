"""Sources of sources: updates whose parts come from several, or whose tasks alternate."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from speechdistill.training.lanes import Batch
from speechdistill.training.recipe import Source


@dataclass(frozen=True)
class Zipped:
    """Update t has the parts of update t of every source, such as a simulated and a real one."""

    sources: Sequence[Source]

    def stream(self, start: int, stop: int, rank: int, world: int) -> Iterator[Batch]:
        streams = [source.stream(start, stop, rank, world) for source in self.sources]
        for batches in zip(*streams, strict=True):
            parts = [
                part._replace(number=part.number * len(batches) + place)
                for place, batch in enumerate(batches)
                for part in batch.parts
            ]
            yield Batch(batches[0].step, tuple(parts))


@dataclass(frozen=True)
class Cycled:
    """Tasks that alternate: update t is that of task t modulo their number, and its source's next update."""

    sources: Mapping[str, Source]

    def stream(self, start: int, stop: int, rank: int, world: int) -> Iterator[Batch]:
        count = len(self.sources)
        streams = [
            source.stream(_updates(start, place, count), _updates(stop, place, count), rank, world)
            for place, source in enumerate(self.sources.values())
        ]
        tasks = list(self.sources)
        for step in range(start, stop):
            place = step % count
            parts = next(streams[place]).parts
            yield Batch(step, tuple(part._replace(task=tasks[place]) for part in parts))


def _updates(step: int, place: int, count: int) -> int:
    """How many of the updates before `step` are those of a task."""
    return (step - place + count - 1) // count
