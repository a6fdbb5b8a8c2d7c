"""Genspeech (Jassim, Skoglund, Chinen and Hines, ICASSP 2021): neural and classical codecs at low rates, MUSHRA scores.

How it is passed on could not be confirmed. So this reads a `labels.csv` that the user makes: `wav_path` (relative to
it), `score` (the mean MUSHRA score, 0 to 100) and where known `system_id` (the codec) and `input_id`.
"""

from collections.abc import Iterator
from typing import Any

from speechdistill.data import corpus


def rows(root: str) -> Iterator[dict[str, Any]]:
    """A row per line, MUSHRA's 0 to 100 as 1 to 5 (Distill-MOS, section III-B)."""
    for line in corpus.lines(f"{root}/labels.csv", ["wav_path", "score"]):
        columns = {"system": line.get("system_id"), "input_id": line.get("input_id")}
        uri = corpus.under(root, line["wav_path"])
        yield {**corpus.given(columns), "uri": uri, "corpus": "genspeech", "split": "test", "mos": _mos(line["score"])}


def _mos(mushra: str) -> float | str:
    try:
        return 1 + float(mushra) / 25
    except ValueError:
        return mushra  # refused with the others that are no scores


READERS = {"genspeech": corpus.Reader(rows, (0, 0, 160))}
