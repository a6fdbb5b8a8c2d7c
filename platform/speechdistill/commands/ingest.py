"""Folders, lists, tars and scored corpora -> `clips.parquet`: lengths are read in parallel on Ray, from headers if they
can be checked against the size of the file.

Work is committed in parts (`data/manifest_parts.py`), so a killed run resumes, and a later run adds only new files and
clips that have changed. `clips.parquet`, the good rows of all parts as one file, is replaced at the end.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Annotated, Any

import tyro
from tqdm import tqdm

from speechdistill.commands import report
from speechdistill.commands.guarded import guarded
from speechdistill.commands.outputs import check_own
from speechdistill.data import file_patterns, headers, listed, listening_tests, manifest_parts
from speechdistill.data.clips import clip_id
from speechdistill.data.corpora import folder, listing, webdataset
from speechdistill.data.corpus import HeldOut
from speechdistill.data.headers import Probed
from speechdistill.data.listed import Row
from speechdistill.data.listening_tests import CorpusName
from speechdistill.engine import cluster
from speechdistill.engine.watch import stop_on_sigterm
from speechdistill.io import lease, outputs, storage, tar_files
from speechdistill.io.errors import RunError
from speechdistill.io.places import Seen, Skipped


@dataclass(frozen=True)
class Ingest:
    """List audio files and read their headers into a clip manifest, OUT/clips.parquet.

    Running it again with more folders adds the new files and updates clips whose file or labels have changed since; ids
    are stable, and a label that is not given again stays. Files that cannot be used are in OUT/rejects.parquet with the
    reason, and are looked at again next time.
    """

    out: str
    """Folder of the manifest, a local path or URL."""
    speech: tuple[str, ...] = ()
    """Folders of speech recordings."""
    speaker_from: str | None = None
    """The speaker of each file of --speech: parent, the name of its folder, or a regular expression that is searched
    for in its address, whose group (or all that it matches) is the speaker, such as 'LibriSpeech/[^/]+/([0-9]+)/'.
    Training holds out whole speakers, and without them source clips."""
    noise: tuple[str, ...] = ()
    """Folders of noise recordings."""
    rir: tuple[str, ...] = ()
    """Folders of room impulse responses."""
    list: tuple[str, ...] = ()
    """CSV, TSV, JSONL or Parquet lists with a column path, and optionally kind, corpus, speaker, mos, ...; and
    WebDataset tars, read in place, whose .json members may give the same columns. Paths, URLs, globs such as 's3://bucket/*.tar',
    and ranges such as 's3://bucket/shard-{000000..000099}.tar'. A list's paths may be URLs or tars, too. A file that
    several lists, --corpus and folders give is one clip: lists and corpora are read as one list, whose rows of a file
    are its mean score and must agree otherwise, and what they leave out of it is taken from its folder."""
    corpus: CorpusName | None = None
    """A corpus that listeners scored, read from --root as it is distributed, with its scores, systems and splits. Here
    csv is a folder with a labels.csv (wav_path, score, and where known system_id, input_id, dataset, split)."""
    root: str | None = None
    """Folder of the corpus as it is unpacked, a local path or URL."""
    held_out: HeldOut = "both"
    """Which clips of dns_2, plc_2022 and sig_2023 validate: both, those whose system and input are held out (the mixed
    ones are left out), or either, those with one of them, too. For another choice take another OUT."""


@guarded("the same command goes on where it stopped")
def command(config: Annotated[Ingest, tyro.conf.arg(name="")]) -> int:
    summary = run(config)
    kinds = ", ".join(f"{n:,} {kind} ({summary['hours'][kind]:.2f} h)" for kind, n in summary["clips"].items())
    print(f"{kinds} in {summary['manifest']}")
    for line in report.changes(summary["changes"]):
        print(line)
    if summary["rejected"]:
        print(f"{summary['rejected']:,} files were rejected; the reasons are in {config.out}/rejects.parquet")
    if summary.get("without_speaker"):
        print(f"--speaker-from {config.speaker_from} names no speaker of {summary['without_speaker']:,} files")
    if config.list:
        print(f"lists{' and corpus' if config.corpus else ''}: {listed.summary(Counter(summary['lists']))}")
    return 0


def run(config: Ingest) -> dict[str, Any]:
    """Ingest everything `config` names and return the summary; raises `RunError` where nothing usable was found."""
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
    files = file_patterns.files(config.list, skipped)  # raises before the work if one is missing
    folder.speaker("", config.speaker_from)
    told: Counter[str] = Counter()
    labeled = scored_rows(config)
    lines = listed.merged(lambda: chain(labeled, chain.from_iterable(map(_lines, files))), told)
    config = replace(config, out=out, list=tuple(files))
    with lease.held(config.out, "ingest") as held:
        cluster.connect()
        stop_on_sigterm()
        whole: set[tuple[str, str]] = set()
        nameless: Counter[str] = Counter()
        rows = _rows(config, lines, skipped, whole, nameless)
        changes = ingest_rows(rows, config.out, before_commit=held.check)
        manifest_parts.forget_rejects((clip_id(kind, tar) for kind, tar in whole), config.out)
        counts: dict[str, Any] = {"changes": dict(changes), "ignored_extensions": dict(skipped), "lists": dict(told)}
        if config.speaker_from:
            counts["without_speaker"] = nameless.total()
        summary = {**manifest_parts.merge(config.out), **counts}
        print(*skipped.lines(), sep="\n", end="\n" if skipped else "", file=sys.stderr)
        storage.publish_json(summary, f"{config.out}/ingest.json")
    if not sum(summary["clips"].values()):
        raise RunError("no usable audio file was found", f"the reasons are in {config.out}/rejects.parquet")
    return summary


def scored_rows(config: Ingest) -> Sequence[Row]:
    """The rows of the corpus that `config` names, if it names one; raises `RunError` for half of a choice."""
    if (config.corpus is None) != (config.root is None):
        raise RunError(
            "one of --corpus and --root", "--corpus NAME and --root DIR, the folder of that corpus, are given together"
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
    """Read the headers of all rows not yet ingested or changed since, and commit them part by part; memory does not
    grow with rows. Returns how many known clips were `updated` (and in which columns), `rejected` or `unreadable`.
    """
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
    cluster.be_patient()
    return headers.probed(chunk, probe)


def _rows(
    config: Ingest, lines: Iterator[Row], skipped: Skipped, whole: set[tuple[str, str]], nameless: Counter[str]
) -> Iterator[Row]:
    folders = {"speech": config.speech, "noise": config.noise, "rir": config.rir}
    names = {kind: folder.names(roots) for kind, roots in folders.items()}
    # Lists come first: of two rows of a file the first is kept, and what its folder knows of it is in that row.
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
