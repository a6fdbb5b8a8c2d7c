"""TCD-VoIP (Harte, Gillen and Hines, QoMEX 2015): echo, chops, clipping, competing speakers and noise.

Recordings are `Test Set/chop/C_01_CHOP_FA.wav` (condition, degradation, speaker), references beside them in `ref/`.
`TCD VOIP - Test Set Conditions and MOS Results.xlsx` has a sheet `Subjective Test Scores` with `Filename, ConditionID,
sample MOS` and a column for each of 24 listeners. Folders are confirmed by ViSQOL's script for this corpus, the names
of the file and of the sheet by google/zimtohrli (`tcd_voip`), scored recordings by unilight/sheet (`egs/tcd-voip`),
`sample MOS` by public code that reads the sheet. Other copies of the file have other names, so any spreadsheet with
these columns will do. The paper has 384 clips in its table (as in this sheet), and 240 in its text.
"""

from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple
from zipfile import BadZipFile

from speechdistill.data import corpus
from speechdistill.data.listed import Row
from speechdistill.io import storage
from speechdistill.io.errors import LibraryError, TableError, UserError

_NAME, _SCORE = "Filename", "sample MOS"
_NUM_LISTENERS = 24
# Raised by openpyxl for files that are not spreadsheets; XML parsers raise subclasses of SyntaxError.
_UNREADABLE = (BadZipFile, SyntaxError, LookupError, ValueError, TypeError, AttributeError)


class _Score(NamedTuple):
    """A line of the spreadsheet; `mos` is the cell as it is, or None."""

    name: str
    mos: Any


def rows(root: str) -> Iterator[Row]:
    """Yield the rows of the corpus; `root` is any folder above the spreadsheet and the recordings.

    References are left out. Raises `LibraryError` if openpyxl is not installed.
    """
    openpyxl = _openpyxl()
    fs, path = storage.file_system(root)
    with storage.access(root):
        uris = [fs.unstrip_protocol(file).removeprefix("file://") for file in fs.find(path)]
    by_name = {uri.rsplit("/", 1)[-1]: uri for uri in uris}
    counts = Counter(uri.rsplit("/", 1)[-1] for uri in uris)
    sheets = (_scores(uri, openpyxl) for uri in uris if uri.lower().endswith(".xlsx"))
    scores = next(filter(None, sheets), None)
    if scores is None:
        reason = f"{root} has no spreadsheet with columns {_NAME!r} and {_SCORE!r}"
        raise TableError(reason, "give the folder of the unpacked corpus with --root")
    if twice := [score.name for score in scores if counts[score.name] > 1]:
        reason = f"{root}: {corpus.some(twice, 'recordings lie in more than one folder')}"
        raise TableError(reason, "keep one copy of each")
    for name, mos in scores:
        _, condition, degradation, speaker = f"{name.removesuffix('.wav')}___".split("_")[:4]
        yield {
            "uri": by_name.get(name, f"{root}/{name}"),
            "corpus": "tcd_voip",
            "split": "test",
            "system": f"{degradation}-{condition}",
            "speaker": speaker,
            "mos": mos,
            "votes": _NUM_LISTENERS,
            "language": "en",
        }


def _scores(uri: str, openpyxl: ModuleType) -> list[_Score]:
    """Read the sheet with scores of a spreadsheet; empty if it has none."""
    try:
        with storage.access(uri, *_UNREADABLE), storage.opened(uri) as file:
            for sheet in openpyxl.load_workbook(file, read_only=True, data_only=True).worksheets:
                lines = sheet.iter_rows(values_only=True)
                header = list(next(lines, ()))
                if {_NAME, _SCORE} <= set(header):
                    columns = header.index(_NAME), header.index(_SCORE)
                    cells = (tuple(line[column] for column in columns) for line in lines)
                    return [_Score(str(name), mos) for name, mos in cells if name]
    except UserError:
        raise
    except _UNREADABLE as error:
        raise TableError(f"{uri} cannot be read as a spreadsheet ({error})", "unpack the corpus again") from error
    return []


def _openpyxl() -> ModuleType:
    """Import openpyxl; raises `LibraryError` if it is not installed."""
    try:
        import openpyxl
    except ImportError as error:
        raise LibraryError("corpus tcd_voip needs openpyxl", "pip install openpyxl") from error
    module: ModuleType = openpyxl
    return module


READERS = {"tcd_voip": corpus.Reader(rows, (0, 0, 384))}
