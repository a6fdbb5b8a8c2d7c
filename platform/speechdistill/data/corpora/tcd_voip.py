"""TCD-VoIP (Harte, Gillen and Hines, QoMEX 2015): echo, chops, clipping, competing speakers and noise.

Recordings are `Test Set/chop/C_01_CHOP_FA.wav` (condition, degradation, speaker), references beside them in `ref/`.
`TCD VOIP - Test Set Conditions and MOS Results.xlsx` has a sheet `Subjective Test Scores`, with `Filename, ConditionID,
sample MOS` and a column for each of 24 listeners. Folders are confirmed by ViSQOL's script for this corpus, the names
of the file and of the sheet by google/zimtohrli (`tcd_voip`), scored recordings by unilight/sheet (`egs/tcd-voip`),
`sample MOS` by public code that reads the sheet. Others call the file differently: any spreadsheet will do.
The paper has 384 clips in its table (this sheet's), and 240 in its text.
"""

import re
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from typing import Any
from zipfile import BadZipFile, ZipFile

from speechdistill.data import corpus
from speechdistill.io import storage
from speechdistill.io.errors import TableError, UserError

_SPREADSHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_NUM_LISTENERS = 24


def rows(root: str) -> Iterator[dict[str, Any]]:
    """`root` is any folder above the spreadsheet and the recordings; references are not in the manifest."""
    fs, path = storage.file_system(root)
    with storage.access(root):
        found = [fs.unstrip_protocol(file).removeprefix("file://") for file in fs.find(path)]
    files = {file.rsplit("/", 1)[-1]: file for file in found}
    counts = Counter(file.rsplit("/", 1)[-1] for file in found)
    sheets = (_sheet(file) for file in found if file.lower().endswith(".xlsx"))
    lines = next(filter(None, sheets), None)
    if lines is None:
        reason = f"{root} has no spreadsheet with columns 'Filename' and 'sample MOS'"
        raise TableError(reason, "--root names the folder of the corpus as it is unpacked")
    if twice := [line["Filename"] for line in lines if counts[line["Filename"]] > 1]:
        reason = f"{root}: {corpus.some(twice, 'recordings lie in more than one folder')}"
        raise TableError(reason, "keep one copy of each")
    for line in lines:
        name = line["Filename"]
        _, condition, degradation, speaker = f"{name.removesuffix('.wav')}___".split("_")[:4]
        yield {
            "uri": files.get(name, f"{root}/{name}"),
            "corpus": "tcd_voip",
            "split": "test",
            "system": f"{degradation}-{condition}",
            "speaker": speaker,
            "mos": line["sample MOS"],
            "votes": _NUM_LISTENERS,
            "language": "en",
        }


def _sheet(file: str) -> list[dict[str, str]]:
    """The lines of its sheet with scores, if it has one; a spreadsheet is a zip of XML: no library is needed."""
    wrong = (BadZipFile, ET.ParseError, LookupError, ValueError)
    try:
        with storage.access(file, *wrong), storage.opened(file) as data, ZipFile(data) as archive:
            names = archive.namelist()
            texts = []
            if "xl/sharedStrings.xml" in names:
                items = ET.fromstring(archive.read("xl/sharedStrings.xml"))
                texts = ["".join(t.text or "" for t in item.iter(f"{_SPREADSHEET}t")) for item in items]
            sheets = sorted(name for name in names if re.fullmatch(r"xl/worksheets/sheet\d+\.xml", name))
            for sheet in sheets:
                lines = [_cells(row, texts) for row in ET.fromstring(archive.read(sheet)).iter(f"{_SPREADSHEET}row")]
                header = lines[0] if lines else {}
                if {"Filename", "sample MOS"} <= set(header.values()):
                    named = [{header[c]: text for c, text in line.items() if c in header} for line in lines[1:]]
                    return [{"sample MOS": "", **line} for line in named if line.get("Filename")]
    except UserError:
        raise
    except wrong as error:
        raise TableError(f"{file} cannot be read as a spreadsheet ({error})", "unpack the corpus again") from error
    return []


def _cells(row: ET.Element, texts: list[str]) -> dict[str, str]:
    """The text of each cell of a row that has one, by the letters of its column."""
    cells = {}
    for cell in row.iter(f"{_SPREADSHEET}c"):
        value = cell.find(f"{_SPREADSHEET}v")
        if cell.get("t") == "inlineStr":
            text = "".join(t.text or "" for t in cell.iter(f"{_SPREADSHEET}t"))
        elif value is None or value.text is None:
            continue
        else:
            text = texts[int(value.text)] if cell.get("t") == "s" else value.text
        cells[cell.get("r", "").rstrip("0123456789")] = text
    return cells


READERS = {"tcd_voip": corpus.Reader(rows, (0, 0, 384))}
