"""Blizzard Challenge 2023 (Perrotin et al., 2023), French: text to speech (NEB) and speaker adaptation (AD).

Layout of track 1 of the VoiceMOS Challenge 2023: `VoiceMOS2023Track1.zip` unpacks to
`VoiceMOS2023Track1/VoiceMOS2023Track1-A-AD_test_0026.wav`, with A the system and AD the task. The answer file has no
header; its lines are the name without `.wav` and the mean score. Confirmed by unilight/sheet (`egs/bc23`), which calls
it `answer.csv`. The archive does not contain it: put it into the same folder.
"""

from collections.abc import Iterator
from functools import partial

from speechdistill.data import corpus
from speechdistill.data.listed import Row


def rows(root: str, task: str) -> Iterator[Row]:
    """Yield the rows of a task, `NEB` or `AD`; `root` has `answer.csv` and recordings, or a folder `wavs`."""
    lines = corpus.lines(f"{root}/answer.csv", ["name", "mos"], header=False)
    uris = [f"{root}/{line['name']}.wav" for line in lines]
    for line, uri, there in zip(lines, uris, corpus.exist(uris), strict=True):
        system = line["name"].split("_")[0].removeprefix("VoiceMOS2023Track1-")
        if not system.endswith(f"-{task}"):
            continue
        yield {
            "uri": uri if there else f"{root}/wavs/{line['name']}.wav",
            "corpus": "blizzard2023",
            "split": "test",
            "system": system,
            "mos": line["mos"],
            "language": "fr",
        }


READERS = {
    "blizzard2023_tts": corpus.Reader(partial(rows, task="NEB"), (0, 0, 840)),
    "blizzard2023_sa": corpus.Reader(partial(rows, task="AD"), (0, 0, 578)),
}
