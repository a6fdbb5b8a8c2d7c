"""The cost of resuming and finishing a run with many parts on S3: seconds, requests and memory of the driver.

The parts are put into a moto server, which then answers each request after a delay. Its own work, in one thread, is in
the seconds: 5 ms of CPU for a part, 0.4 s for a page of a listing.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Literal
from urllib.request import urlopen

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from speechdistill.engine import parts, shards
from speechdistill.engine.footers import Footers, Part
from speechdistill.io import table
from speechdistill.labelling import figures

ROWS = 64  # of a part, as in the labelling job
NO_REJECT, ONE_REJECT = 0, 1  # parts by their number, of which every twentieth is of the second kind

# It ends with its stdin.
SERVER = """
import functools, os, sys, threading, time
from moto.core import DEFAULT_ACCOUNT_ID
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import S3Backend, s3_backends
from werkzeug.serving import make_server

folder, count, delay_s = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
data = [open(f"{folder}/{kind}", "rb").read() for kind in (0, 1)]
backend = s3_backends[DEFAULT_ACCOUNT_ID]["aws"]
backend.create_bucket("bucket", "us-east-1")
for name in ("run.json", "footers.parquet"):
    if os.path.exists(f"{folder}/run0/{name}"):
        backend.put_object("bucket", f"run/{name}", open(f"{folder}/run0/{name}", "rb").read())
for k in range(count):
    backend.put_object("bucket", f"run/shards/part-{k:08d}-00000064.parquet", data[k % 20 == 0])
# moto gathers and sorts all names for each page of a listing, which no store does.
gathered = functools.cache(lambda *asked: list_objects(backend, *asked, marker=None, max_keys=None))
list_objects = S3Backend.list_objects
S3Backend.list_objects = lambda self, *asked, marker, max_keys: gathered(*asked)
application, requests = DomainDispatcherApplication(create_backend_app), [0]

def delayed(environ, start_response):
    if environ["PATH_INFO"] == "/requests":
        start_response("200 OK", [])
        return [str(requests[0]).encode()]
    requests[0] += 1
    time.sleep(delay_s)
    return application(environ, start_response)

server = make_server("127.0.0.1", 0, delayed, threaded=True)
print(f"http://127.0.0.1:{server.port}", flush=True)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()
"""


@dataclass(frozen=True)
class Options:
    """Number of parts; 1,000 take half a minute."""

    parts: tuple[int, ...] = (1_000, 10_000, 100_000)
    """Parts of each run, all there but the last."""
    delay_ms: float = 30.0
    """How long the server waits before each answer."""
    steps: tuple[Literal["resume", "finish"], ...] = ("resume", "finish")
    """Steps to measure, each in its own process. `finish` also opens parts that a run's own driver knows."""
    footers: bool = True
    """Begin with the `footers.parquet` that a killed run leaves; without, as of a version that kept none."""


def main(options: Options) -> None:
    print("| parts | step | s | of them CPU of the driver | requests | peak memory of the driver, GB |")
    print("|" + "---|" * 6, flush=True)
    for count in options.parts:
        with served(count, options) as url:
            for step in options.steps:
                before = _requests(url)
                command = [sys.executable, __file__, "--step", step, str(count)]
                run = subprocess.run(command, env=_environment(url), stdout=subprocess.PIPE, check=True, text=True)
                seconds, cpu_s, peak = map(float, run.stdout.split())
                requests = _requests(url) - before
                print(
                    f"| {count:,} | {step} | {seconds:.1f} | {cpu_s:.1f} | {requests:,} | {peak / 1e9:.2f} |",
                    flush=True,
                )


@contextmanager
def served(count: int, options: Options) -> Iterator[str]:
    """The address of a server with `count` parts but the last."""
    with tempfile.TemporaryDirectory() as folder:
        for kind in (NO_REJECT, ONE_REJECT):
            Path(folder, str(kind)).write_bytes(_part(kind, folder))
        if options.footers:
            _note(count - 1, folder)
        command = [sys.executable, "-c", SERVER, folder, str(count - 1), str(options.delay_ms / 1000)]
        server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        try:
            assert server.stdout
            yield server.stdout.readline().strip()
        finally:
            server.kill()
            server.communicate()


def _part(kind: int, folder: str) -> bytes:
    """A part of short waves, whose footer is that of a real one."""
    layout = shards.Layout(
        out=f"{folder}/run{kind}",
        schema="pseudolabel.v1",
        id_column="sample_id",
        num_ids=ROWS,
        rows_per_part=ROWS,
        totals=figures.of_part,
    )
    block, rng = parts.block(layout.ids(0)), np.random.default_rng(kind)
    known = {"plan": "{}", "clip_ids": ["clip"], "segment_start_s": 0.0, "segment_duration_s": 7.68}
    known |= {"audio_format": "flac", "sample_rate": 16_000, "num_samples": 122_880, "audio": rng.bytes(16)}
    known |= {"teacher": "distillmos", "teacher_hash": "0" * 64, "logit": 0.0}
    for field in table.schema(layout.schema):
        if field.name == "score":
            block = block.append_column(field, pa.array(rng.uniform(1, 5, ROWS), field.type))
        elif field.name != "sample_id":
            block = block.append_column(field, pa.array([known.get(field.name)] * ROWS, field.type))
    if kind == ONE_REJECT:
        for name, text in zip(shards.REJECT.names, ("degrade", "AudioError", "s3://bucket/a.flac: empty"), strict=True):
            values = pa.array([text, *[None] * (ROWS - 1)], pa.string())
            block = block.set_column(block.column_names.index(name), name, values)
    shards.claim(layout.out, {})
    shards.write_parts(block, layout)
    return Path(layout.path(0, ROWS)).read_bytes()


def _note(count: int, folder: str) -> None:
    """Write the files of a driver that commits so many parts."""
    data = [Path(folder, str(kind)).read_bytes() for kind in (NO_REJECT, ONE_REJECT)]
    about = [Part.from_json(pq.read_metadata(BytesIO(one)).metadata[b"part"]) for one in data]
    noted = Footers(f"{folder}/run0")
    for k in range(count):
        noted.note(replace(about[k % 20 == 0], number=k, size_bytes=len(data[k % 20 == 0])))


def step(name: str, count: int) -> None:
    """One step in this process, which is a driver's; prints its seconds and this process's peak memory in bytes."""
    layout = shards.Layout(
        out="s3://bucket/run",
        schema="pseudolabel.v1",
        id_column="sample_id",
        num_ids=ROWS * count,
        rows_per_part=ROWS,
        totals=figures.of_part,
    )
    start, cpu_s = time.perf_counter(), time.process_time()
    if name == "finish":
        shards.finish(layout, complete=False)
    else:
        shards.claim(layout.out, {})
        missing, totals = shards.survey(layout)
        assert missing == [count - 1] and totals.rejected == -(-(count - 1) // 20), (missing, totals)
        shards.reopen(layout)
    seconds = time.perf_counter() - start
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(seconds, time.process_time() - cpu_s, int(lines["VmHWM"].split()[0]) * 1024)


def _environment(url: str) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**os.environ, **keys, "AWS_ENDPOINT_URL": url}


def _requests(url: str) -> int:
    with urlopen(f"{url}/requests") as answer:
        return int(answer.read())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        step(sys.argv[2], int(sys.argv[3]))
    else:
        main(tyro.cli(Options))
