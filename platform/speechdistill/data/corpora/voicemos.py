"""VoiceMOS Challenge 2022 (Huang et al., Interspeech 2022): the English main track and the Chinese out-of-domain track.

`main.tar.gz` and `ood.tar.gz` (zenodo.org/records/6572573) unpack to `DATA/wav/*.wav` and lists without a header,
`DATA/sets/{train,val,test}_mos_list.txt`, with lines such as `sys64e2f-utt9c183cd.wav,3.5`. The out-of-domain track's
`unlabeled_mos_list.txt` has no scores; `unlabeled_mos_list_LABELS.txt` was published later, and the paper (section
III-A) trains on it. Confirmed by the READMEs of both tracks, and the lines by public code. The format of the list of
labels is assumed to be the same. Scripts that come with the lists download the recordings.
"""

from collections.abc import Iterator
from functools import partial

from speechdistill.data import corpus
from speechdistill.data.listed import Row

_MAIN = {"train_mos_list": "train", "val_mos_list": "validation", "test_mos_list": "test"}
_OOD = {**_MAIN, "unlabeled_mos_list_LABELS": "train"}


def rows(root: str, splits: dict[str, str], language: str) -> Iterator[Row]:
    """Yield a row per line; `root` is the folder that contains `DATA`, `splits` the split of each list."""
    for name, split in splits.items():
        for line in corpus.lines(f"{root}/DATA/sets/{name}.txt", ["wav", "mos"], header=False):
            yield {
                "uri": corpus.under(f"{root}/DATA/wav", line["wav"]),
                "corpus": "voicemos2022",
                "split": split,
                "system": line["wav"].split("-")[0],
                "mos": line["mos"],
                "language": language,
            }


READERS = {
    "voicemos2022_en": corpus.Reader(partial(rows, splits=_MAIN, language="en"), (4_973, 1_065, 1_065)),
    "voicemos2022_cn": corpus.Reader(partial(rows, splits=_OOD, language="zh"), (674, 136, 539)),
}
