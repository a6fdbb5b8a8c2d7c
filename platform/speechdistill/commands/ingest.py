"""Folders, lists, tars and scored corpora -> `clips.parquet`.

Ray tasks read the lengths in parallel, from headers if the size of the file confirms them. Work is committed in parts
(`data/manifest_parts.py`): a killed run resumes, and a later run adds only new files and clips that have changed.
`clips.parquet`, the good rows of all parts in one file, is replaced at the end.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Annotated

import tyro
from tqdm import tqdm

from speechdistill.commands import report
from speechdistill.commands.guarded import guarded
from speechdistill.commands.outputs import check_own
from speechdistill.commands.results import IngestSummary
from speechdistill.data import file_patterns, headers, listed, listening_tests, manifest_parts
from speechdistill.data.clips import clip_id
from speechdistill.data.corpora import folder, listing, webdataset
from speechdistill.data.corpus import HeldOut
from speechdistill.data.headers import Probed
from speechdistill.data.listed import Row
from speechdistill.data.listening_tests import CorpusName
from speechdistill.engine.watch import stop_on_sigterm
from speechdistill.io import lease, outputs, storage, tar_files
from speechdistill.io.errors import RunError
from speechdistill.io.places import Seen, Skipped


@dataclass(frozen=True, kw_only=True)
class Ingest:
    """List audio files and read their headers into a clip manifest, OUT/clips.parquet.

    The same command with more folders adds the new files and updates clips whose file or labels have changed; ids are
    stable, and a label that is not given again stays. OUT/rejects.parquet lists files that cannot be used, with the
    reason; the next call tries them again.
    """

    out: str
    """Folder of the manifest, a local path or URL."""
    speech: tuple[str, ...] = ()
    """Folders of speech recordings."""
    speaker_from: str | None = None
    """The speaker of each file of --speech: parent, the name of the file's folder, or a regular expression that is
    searched for in the file's address. Its group (or the whole match) is the speaker, as in
    'LibriSpeech/[^/]+/([0-9]+)/'. Training holds out whole speakers, or source clips if no speakers are known."""
    noise: tuple[str, ...] = ()
    """Folders of noise recordings."""
    rir: tuple[str, ...] = ()
    """Folders of room impulse responses."""
    list: tuple[str, ...] = ()
    """CSV, TSV, JSONL or Parquet lists with a column path, and optionally kind, corpus, speaker, mos, ...; and
    WebDataset tars, read in place, whose .json members may give the same columns. Give paths, URLs, globs such as
    's3://bucket/*.tar', or ranges such as 's3://bucket/shard-{000000..000099}.tar'. The paths in a list may be URLs or
    tars. A file that several lists, --corpus and folders name is one clip: its score is the mean over its rows, which
    must agree in all other columns, and its folder fills in the missing ones."""
    corpus: CorpusName | None = None
    """A corpus that listeners scored, read from --root as it is distributed, with its scores, systems and splits. csv
    is a folder with a labels.csv (wav_path, score, and if known system_id, input_id, dataset, split)."""
    root: str | None = None
    """Folder of the unpacked corpus, a local path or URL."""
    held_out: HeldOut = "both"
    """Clips of dns_2, plc_2022 and sig_2023 that validate. both: system and input are held out; clips with one of them
    are left out. either: clips with one of them validate as well. Another choice needs another --out."""


@guarded("progress so far is kept; the same command resumes")
def command(config: Annotated[Ingest, tyro.conf.arg(name="")]) -> int:
    summary = run(config)
    kinds = ", ".join(f"{n:,} {kind} ({report.duration(summary.hours[kind])})" for kind, n in summary.clips.items())
    print(f"{kinds} in {summary.manifest}")
    for line in report.changes(summary.changes):
        print(line)
    if summary.rejected:
        print(f"{summary.rejected:,} files were rejected; the reasons are in {config.out}/rejects.parquet")
    if summary.without_speaker:
        print(f"--speaker-from {config.speaker_from} matches no speaker in {summary.without_speaker:,} files")
    if config.list:
        print(f"lists{' and corpus' if config.corpus else ''}: {listed.summary(Counter(summary.lists))}")
    return 0


def run(config: Ingest) -> IngestSummary:
    """Ingest everything that `config` names and return the summary; raises `RunError` if nothing usable was found."""
    from speechdistill.engine import cluster

    if not (config.speech or config.noise or config.rir or config.list or config.corpus):
        raise RunError(
            "nothing to ingest",
            "give --speech DIR, --noise DIR, --rir DIR, --list FILE, or --corpus NAME with --root DIR",
        )
    cluster.be_patient()
    out = storage.absolute(config.out)
    check_own(out, "ingest")
    outputs.try_outputs(
        *(f"{out}/{name}" for name in ("clips.parquet", "rejects.parquet", "ingest.json", "parts/clips"))
    )
    skipped = Skipped()
    files = file_patterns.files(config.list, skipped)  # missing ones are reported before any work
    folder.speaker("", config.speaker_from)
    rows_of_lists: Counter[str] = Counter()
    labeled = scored_rows(config)
    lines = listed.merged(lambda: chain(labeled, chain.from_iterable(map(_lines, files))), rows_of_lists)
    config = replace(config, out=out, list=tuple(files))
    with lease.held(config.out, "ingest") as held:
        cluster.connect()
        stop_on_sigterm()
        whole: set[tuple[str, str]] = set()
        nameless: Counter[str] = Counter()
        rows = _rows(config, lines, skipped, whole, nameless)
        changes = ingest_rows(rows, config.out, before_commit=held.check)
        manifest_parts.forget_rejects((clip_id(kind, tar) for kind, tar in whole), config.out)
        summary = IngestSummary(
            **manifest_parts.merge(config.out),
            changes=dict(changes),
            ignored_extensions=dict(skipped),
            lists=dict(rows_of_lists),
            without_speaker=nameless.total() if config.speaker_from else None,
        )
        print(*skipped.lines(), sep="\n", end="\n" if skipped else "", file=sys.stderr)
        storage.publish_json(summary.to_json(), f"{config.out}/ingest.json")
    if not sum(summary.clips.values()):
        raise RunError("no usable audio file was found", f"the reasons are in {config.out}/rejects.parquet")
    return summary


def scored_rows(config: Ingest) -> Sequence[Row]:
    """Return the rows of the corpus that `config` names, if any; raises `RunError` if --corpus or --root is missing."""
    if (config.corpus is None) != (config.root is None):
        raise RunError(
            "one of --corpus and --root", "give --corpus NAME and --root DIR, the folder of that corpus, together"
        )
    if config.corpus is None or config.root is None:
        return ()
    rows = listening_tests.rows(config.corpus, config.root, config.held_out)
    return [{**row, listed.PLACE: f"--corpus {config.corpus}"} for row in rows]


def ingest_rows(
    rows: Iterator[Row],
    out: str,
    probe: Callable[[Row], Row] = headers.clip,
    before_commit: Callable[[], None] = lambda: None,
) -> Counter[str]:
    """Read the headers of all rows that are new or have changed, and commit them part by part in constant memory.

    Returns the numbers of known clips that were `updated` (and in which columns), `rejected` or `unreadable`.
    """
    from speechdistill.engine import cluster

    number = manifest_parts.next_number(out)
    changes: Counter[str] = Counter()
    with tqdm(unit="file", dynamic_ncols=True, desc="headers") as bar:
        for probed in cluster.in_order(partial(_probed, probe=probe), manifest_parts.chunks(rows, out)):
            changes += probed.changes
            if len(probed.clips) or len(probed.rejects):
                before_commit()
                bar.update(manifest_parts.commit(probed, out, number))
                number += 1
    return changes


def _probed(chunk: list[Row], probe: Callable[[Row], Row]) -> Probed:
    from speechdistill.engine import cluster

    cluster.be_patient()
    return headers.probed(chunk, probe)


def _rows(
    config: Ingest, lines: Iterator[Row], skipped: Skipped, whole: set[tuple[str, str]], nameless: Counter[str]
) -> Iterator[Row]:
    folders = {"speech": config.speech, "noise": config.noise, "rir": config.rir}
    names = {kind: folder.names(roots) for kind, roots in folders.items()}
    # Lists come first: the first of two rows of a file is kept, and it has the columns of the file's folder.
    for row in webdataset.rows(lines, skipped, whole):
        is_member = tar_files.parse(row["uri"]) is not None
        yield row if is_member else folder.known(row, names.get(row["kind"], {}), config.speaker_from)
    for kind, roots in folders.items():
        seen = Seen()
        for root in roots:
            for row in folder.rows(root, kind, skipped, seen):
                if speaker := folder.speaker(row["uri"], config.speaker_from) if kind == "speech" else None:
                    row["speaker"] = speaker
                nameless[kind] += kind == "speech" and speaker is None
                yield row


def _lines(file: str) -> Iterator[Row]:
    return iter([{"uri": file, "kind": "speech"}]) if webdataset.is_tar(file) else listing.rows(file)
