"""Tables that users wrote: every spelling is read alike, and what cannot be read is refused with its line."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from speechdistill.io import user_table
from speechdistill.io.errors import TableError

EXPECTED = [{"path": "a.wav", "mos": "4.0"}, {"path": "b.wav", "mos": "2.5"}]
CSV = "path,mos\na.wav,4.0\nb.wav,2.5\n"


def read(file: Path, data: bytes | str, needed: tuple[str, ...] = ("path/uri",)) -> list[user_table.Line]:
    file.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(user_table.rows(str(file), needed))


@pytest.mark.parametrize(
    "data",
    [
        CSV,
        "\ufeff" + CSV,
        CSV.encode("utf-16"),
        ("\ufeff" + CSV).encode("utf-16-be"),
        CSV.replace("\n", "\r\n"),
        CSV.replace("\n", "\r"),
        CSV.replace("\n", "\r\r\n"),
        "\n \n" + CSV.replace("\n", "\n\n") + ",\n , \n",
        CSV.strip(),
        CSV.replace(",", ";"),
        CSV.replace(",", "\t"),
        CSV.replace(",", "|"),
        CSV.replace(",", ", "),
        "sep=;\r\n" + CSV.replace(",", ";"),
        CSV.replace("path,mos", " Path , MOS "),
        CSV.replace("\n", ",\n"),
        CSV.replace("4.0\n", "4.0,,,\n"),
        CSV.replace("a.wav", '"a.wav"'),
        CSV.replace("a.wav", '"a.wav"').replace(",", "\t"),
        ",path,mos\n0,a.wav,4.0\n1,b.wav,2.5\n",
    ],
    ids=lambda data: repr(data[:30]),
)
def test_every_spelling_of_a_table_is_read_alike(tmp_path: Path, data: bytes | str) -> None:
    lines = read(tmp_path / "l.csv", data)
    assert [line.values for line in lines] == EXPECTED and not any(line.fault for line in lines)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            'path,mos,text\na,4,x\nb,2,"Stop!" he said\nc,4,"open\nd,2,d\ne,4,e\n',
            "line 4: a quote opens and never closes",
        ),
        ('path,text\na,"open\nb,"closed"\nc,z\n', "line 2: a quote opens, and the next, in line 3, does not fit"),
        ('path,text,n\na,"open\nb,x\nc,y",1,2\n', "line 2: a quote opens, and the next, in line 4, does not fit"),
        (
            'path,mos,text\na.wav,4,"open\nb.wav,,x\nc.wav,2,y"\n',
            "line 2: a quote opens and closes in line 4, but line 3",
        ),
        ('path,text\na,x\nb,"open', "line 3: a quote opens and never closes"),
        (b"path,speaker\na,x\nb,J\xfcrgen\n", "line 3: byte 0xfc is not UTF-8; save the list as UTF-8"),
        (CSV.encode("utf-16-le"), "line 1: a NUL character.*save the list as UTF-8"),
        (CSV.encode("utf-16")[:-1], "cannot be read as a table .*truncated data"),
        (CSV.encode("utf-32"), "line 1: a NUL character"),
        ("path,mos\na,4\nb\0,2\n", "line 3: a NUL character"),
        (
            "file,mos\na,4\n",
            r"columns \['path or uri'\] are missing; it has \['file', 'mos'\]; rename or add them in the",
        ),
        ("a.wav,4.0\n", r"columns \['path or uri'\] are missing; it has \['a.wav', '4.0'\]"),
        ("", r"it has \[\]"),
        ("path,mos,MOS\na,4,5\n", r"columns \['mos'\] occur twice in \['path', 'mos', 'MOS'\]; rename or delete"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(tmp_path: Path, data: bytes | str, message: str) -> None:
    with pytest.raises(TableError, match=rf"l\.csv[,: ].*{message}"):
        read(tmp_path / "l.csv", data)


def test_a_text_may_hold_line_breaks_quotes_and_delimiters(tmp_path: Path) -> None:
    text = 'one\r\ntwo, three "four"\n\nfive, six'
    quoted = text.replace('"', '""')
    lines = read(tmp_path / "l.csv", f'path,text,mos\na.wav,"{quoted}",4.0\nb.wav,plain,2.5\n')
    assert [line.values["text"] for line in lines] == [text, "plain"] and [line.number for line in lines] == [2, 6]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (0, 2, 1)])
def test_a_text_with_line_breaks_may_stand_in_any_column(tmp_path: Path, order: tuple[int, ...]) -> None:
    rows = [("a.wav", "4.0", "one\ntwo, three\nfour"), ("b.wav", "2.5", "\n"), ("c.wav", "", 'x\n"y", z')]
    with (tmp_path / "l.csv").open("w", newline="") as file:
        csv.writer(file).writerows([row[i] for i in order] for row in [("path", "mos", "text"), *rows])
    lines = user_table.rows(str(tmp_path / "l.csv"), ["path/uri"])
    assert [tuple(line.values[name] for name in ("path", "mos", "text")) for line in lines] == rows


@pytest.mark.parametrize(
    "text",
    [
        'text,path,mos\n"plain,c1.wav,2.5\nhe said, so",c2.wav,2.5\n',
        'path,mos,text\nc0.wav,1,"end ""q""\nc1.wav,4.25,he said, so"\n',
        'path,text,mos\nc0.wav,"he said, so,1\nc1.wav,he said, so",4.25\n',
        'text,path,mos\n",c0.wav,1\n",c1.wav,2.5\n',
    ],
)
def test_a_quote_that_swallows_a_row_and_closes_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(TableError, match=r"l\.csv, line 2: a quote opens"):
        read(tmp_path / "l.csv", text)


def test_quotation_marks_between_tabs_are_texts(tmp_path: Path) -> None:
    """Common Voice writes sentences as they are: coqui-ai/STT#2321, pytorch/audio#2838."""
    sentences = ['"Stop', "he said", 'so "be" it"', '"all of it"', '"a ""b"" c"']
    lines = read(tmp_path / "l.tsv", "path\tsentence\n" + "".join(f"{i}\t{s}\n" for i, s in enumerate(sentences)))
    assert [line.values["sentence"] for line in lines] == [*sentences[:3], "all of it", 'a "b" c']


def test_rows_that_are_too_long_or_too_short_are_named(tmp_path: Path) -> None:
    """Line breaks and tabs within Common Voice's cells: common-voice/common-voice#4429."""
    lines = read(tmp_path / "l.tsv", "path\ttext\tmos\na\tone\t4\nb\ttw\tice\t5\nc\tthr\nee\t3\n")
    assert [(line.number, line.fault) for line in lines] == [
        (2, None),
        (3, "has 4 fields instead of 3"),
        (4, "has 2 fields instead of 3"),
        (5, "has 2 fields instead of 3"),
    ]


def test_a_field_may_be_longer_than_pythons_limit(tmp_path: Path) -> None:
    """`field larger than field limit (131072)`: coqui-ai/STT#2321, machine-intelligence-laboratory/TopicNet#3."""
    (line,) = read(tmp_path / "l.csv", f"path,text\na,{'x' * 200_000}\n")
    assert len(line.values["text"]) == 200_000


def test_rows_of_json_are_read_alike(tmp_path: Path) -> None:
    """Blank lines and blanks around an object: NVIDIA-NeMo/Speech#8661."""
    text = "\ufeff" + '\n {"Path": "a.wav", "mos ": NaN} \r\n   \n{"uri": "b.wav"}'
    first, second = read(tmp_path / "l.jsonl", text)
    assert first.values["path"] == "a.wav" and first.values["mos"] != first.values["mos"]
    assert (first.number, second) == (2, user_table.Line(4, {"uri": "b.wav"}))
    assert [line.values for line in read(tmp_path / "l.jsonl", json.dumps(EXPECTED[0]).encode("utf-16"))] == EXPECTED[
        :1
    ]


@pytest.mark.parametrize("name", ["a\\u0000.wav", "\\ud800.wav"])
def test_json_may_write_names_that_no_file_has(tmp_path: Path, name: str) -> None:
    bad, good = read(tmp_path / "l.jsonl", f'{{"path": "{name}"}}\n{{"path": "\\u00fc.wav"}}')
    assert bad.fault == "has a NUL or half a character in it" and good == (2, {"path": "ü.wav"}, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"path": "b.wav",}', "line 2 is not a JSON object"),
        ('[["path", "b.wav"]]', "line 2 is not a JSON object but a list"),
        ("[" * 100_000, "line 2 is not a JSON object"),
        ('{"path": "b", "mos": 1, "mos": 5}', r"line 2 gives a key twice: \['path', 'mos', 'mos'\]"),
        ('{"path": "b", "mos": 1, "MOS": 5}', r"line 2: columns \['mos'\] occur twice"),
        ('{"mos": 1}', r"line 2: columns \['path or uri'\] are missing; it has \['mos'\]"),
    ],
)
def test_json_that_cannot_be_read_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(TableError, match=rf"l\.jsonl, {message}"):
        read(tmp_path / "l.jsonl", '{"path": "a"}\n' + line)


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_of_every_type_of_text_is_read(tmp_path: Path, kind: Any) -> None:
    columns = {"Path": pa.array(["a.wav", "b.wav"]).cast(kind), "mos": pa.array([4.0, None], pa.float32())}
    pq.write_table(pa.table(columns), tmp_path / "l.parquet")
    lines = list(user_table.rows(str(tmp_path / "l.parquet"), ["path/uri"]))
    assert lines == [(1, {"path": "a.wav", "mos": 4.0}, None), (2, {"path": "b.wav", "mos": None}, None)]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.binary())])
def test_texts_that_parquet_holds_as_bytes_are_texts(tmp_path: Path, kind: Any) -> None:
    """Some writers mark no column as text: rapidsai/cudf#5593, hardwood-hq/hardwood#203."""
    texts = pa.array(["ä.wav".encode(), b"latin-\xe9.wav", None]).cast(kind)
    pq.write_table(pa.table({"path": texts}), tmp_path / "l.parquet")
    found = [line.values["path"] for line in user_table.rows(str(tmp_path / "l.parquet"), ["path/uri"])]
    assert found == ["ä.wav", b"latin-\xe9.wav", None]


@pytest.mark.parametrize("name", ["a::b", "~", "a%20b", "take[1]", "a*b", "a#b", "{0..1}", "http:", "ä\n"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_a_list_may_have_any_name(tmp_path: Path, name: str, suffix: str) -> None:
    """fsspec takes some for globs and archives: fsspec/filesystem_spec#1476 and #1782."""
    file = tmp_path / f"{name}{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table({"path": ["a.wav", "b.wav"], "mos": ["4.0", "2.5"]}), file)
        assert [line.values for line in user_table.rows(str(file), ["path/uri"])] == EXPECTED
    else:
        text = CSV if suffix == ".csv" else "\n".join(map(json.dumps, EXPECTED))
        assert [line.values for line in read(file, text)] == EXPECTED


def test_parquet_without_the_column_or_damaged_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"file": ["a"], "mos": [4.0]}), tmp_path / "l.parquet")
    with pytest.raises(TableError, match=r"\['path or uri'\] are missing; it has \['file', 'mos'\]"):
        list(user_table.rows(str(tmp_path / "l.parquet"), ["path/uri"]))
    with pytest.raises(TableError, match=r"l\.parquet cannot be read as a table"):
        read(tmp_path / "l.parquet", (tmp_path / "l.parquet").read_bytes()[:-9])
