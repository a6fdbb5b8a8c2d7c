"""ConferencingSpeech 2022 (Yi et al., Interspeech 2022): the PSTN, Tencent and TUB corpora.

PSTN: `train.zip` unpacks to `pstn_train/`, with `pstn_train.csv` (`filename, MOS, std, 95%CI, votes`) beside the
recordings. Tencent: `TencentCorups.zip` unpacks to two lists (`deg_wav, mos`) and a folder for each. Both are confirmed
by lcn-kul/conferencing-speech-2022 (`src/constants.py`) and unilight/sheet (`egs/pstn`, `egs/tencent`); Tencent's lists
are in ConferencingSpeech/ConferencingSpeech2022 (`datasets/TencentCorpus`). The list with reverberation names a folder
that ends in `MOS`, public code a folder that does not: both are accepted.

Participants received the test clips by mail without labels; how the labels were distributed later could not be
confirmed. So the layout of the test set is ours: `test.csv` in the corpus' folder, with `deg_wav` (relative to it) and
`mos`.
"""

from collections.abc import Iterator

from speechdistill.data import corpus
from speechdistill.data.listed import Row

_TENCENT = ("withReverberationTrainDev", "withoutReverberationTrainDev")


def pstn(root: str) -> Iterator[Row]:
    """Yield PSTN; `root` has `pstn_train/`, and optionally `test.csv`."""
    lines = corpus.lines(f"{root}/pstn_train/pstn_train.csv", ["filename", "mos", "votes"])
    train = [
        {
            **corpus.given({"votes": line["votes"]}),
            "uri": corpus.under(f"{root}/pstn_train", line["filename"]),
            "mos": line["mos"],
        }
        for line in lines
    ]
    for row in [*corpus.with_validation(train), *_test(root, needed=False)]:
        yield {**row, "corpus": "pstn", "language": "en"}


def tencent(root: str) -> Iterator[Row]:
    """Yield Tencent; `root` is the folder `TencentCorups`, optionally with `test.csv`."""
    train = []
    for part in _TENCENT:
        lines = corpus.lines(f"{root}/{part}MOS.csv", ["deg_wav", "mos"])
        uris = [corpus.under(root, line["deg_wav"]) for line in lines]
        for line, uri, there in zip(lines, uris, corpus.exist(uris), strict=True):
            uri = uri if there else uri.replace(f"/{part}MOS/", f"/{part}/")
            train.append({"uri": uri, "mos": line["mos"]})
    for row in [*corpus.with_validation(train), *_test(root, needed=False)]:
        yield {**row, "corpus": "tencent", "language": "zh"}


def tub(root: str) -> Iterator[Row]:
    """Yield TUB; `root` is the folder `TUB_IS22_DB1`, with a `test.csv`."""
    for row in _test(root, needed=True):
        yield {**row, "corpus": "tub"}


def _test(root: str, needed: bool) -> Iterator[Row]:
    file = f"{root}/test.csv"
    for line in corpus.lines(file, ["deg_wav", "mos"]) if needed or all(corpus.exist([file])) else ():
        yield {"uri": corpus.under(root, line["deg_wav"]), "mos": line["mos"], "split": "test"}


READERS = {
    "pstn": corpus.Reader(pstn, (57_709, 1_000, 1_040)),
    "tencent": corpus.Reader(tencent, (10_563, 1_000, 2_898)),
    "tub": corpus.Reader(tub, (0, 0, 434)),
}
