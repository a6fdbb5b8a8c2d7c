"""The trials of `speechdistill doctor`: each uses the thing that it names, in a child process, here or on a node.

A trial is a function `(member, places) -> detail`. It raises `Missing` for something that is not installed, set or
asked for, and any other exception for something that does not work.
"""

import os
import platform
import re
import shutil
import sqlite3
import tempfile
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import fsspec
import numpy as np

from speechdistill.commands.doctor_audio import AV, SOUNDFILE, Missing, corpus, format_trial, voice
from speechdistill.data import components, degradation, manifest_path, plan
from speechdistill.data.clips import Clips
from speechdistill.data.degradation_recipes import COMPONENTS, RECIPES, with_assets
from speechdistill.io import audio, storage
from speechdistill.io.assets import Asset
from speechdistill.io.audio import SAMPLE_RATE
from speechdistill.io.errors import MissingError, UserError
from speechdistill.labelling.samples import check_step, make_sample
from speechdistill.models.load import load_teacher, teacher_names
from speechdistill.models.model import Model
from speechdistill.tracking import database
from speechdistill.tracking.run import tracking_uri


class Places(NamedTuple):
    """Places of results, of a manifest and of the recipes' assets by name, if known; absolute paths or URLs."""

    out: str | None = None
    clips: str | None = None
    assets: tuple[tuple[str, str], ...] = ()


def names() -> list[str]:
    """Return the names of all trials, in the order of the report."""
    return [
        "machine",
        *(f"teacher:{name}" for name in teacher_names()),
        *(f"degradation:{name}" for name in COMPONENTS),
        *(f"recipe:{name}" for name in RECIPES),
        *(f"format:{name}" for name in (*SOUNDFILE, *AV)),
        *("gpu", "storage:s3", "storage:out", "clips", "tracking", "demo", "torchaudio"),
    ]


@contextmanager
def published(out: str, name: str) -> Iterator[str]:
    """Yield a small file in the folder or URL `out`; remove the file afterwards, and folders that were made for it."""
    uri = f"{out}/{name}"
    made = [folder for folder in Path(uri).parents if not folder.exists()] if "://" not in uri else []
    try:
        storage.publish(name.encode(), uri)
        try:
            yield uri
        finally:
            fs, path = storage.file_system(uri)
            fs.rm_file(path)
    finally:
        for folder in made:
            if folder.exists():
                folder.rmdir()


def _machine(_: str, places: Places) -> str:
    folder = tempfile.gettempdir()
    free_gb = shutil.disk_usage(folder).free / 1e9
    cpus = len(os.sched_getaffinity(0))
    text = f"Python {platform.python_version()} on {platform.machine()}, {cpus} CPUs, {free_gb:.0f} GB free in {folder}"
    if free_gb < 1:
        raise OSError(text)
    return text


def _teacher(name: str, places: Places) -> str:
    model = Model(load_teacher(name))
    speech = voice(2.0)
    score = model(speech, SAMPLE_RATE, **({"reference": speech} if model.teacher.intrusive else {}))
    if not 1 <= score <= 5:
        raise ArithmeticError(f"a score of {score}, which is not from 1 to 5")
    return f"weights {model.teacher.weights_hash[:12]} give a synthetic voice {score:.2f} MOS"


@cache  # recipes try their components again
def _degradation(name: str, places: Places) -> str:
    """Draw and apply a component, with and without recordings of noise and rooms."""
    recipe = plan.DegradationRecipe(name, (plan.RecipeStage("only", {name: 1.0}),), assets=_given(places))
    try:
        assets = with_assets(recipe).assets
    except MissingError as error:
        reason = str(error).splitlines()[1].strip().removeprefix(f"{name}: ")
        raise Missing(reason, f"get it, or give the jobs --without {name}") from error
    component = components.component(name)
    steps = set()
    with corpus() as manifests:
        for clips in manifests:
            clip = clips.speech[0]
            wave = audio.load(clip.uri)
            scene = degradation.Scene(clip.clip_id, clip.speaker, len(wave), clips, assets=assets)
            for seed in range(4):
                step = component.draw(np.random.default_rng(seed), scene)
                degraded = step.apply(wave)
                check_step(step, wave, degraded)
                steps.add(type(step).__name__)
    return f"{', '.join(sorted(steps))} applied"


def _recipe(name: str, places: Places) -> str:
    try:
        recipe = with_assets(replace(RECIPES[name](), assets=_given(places)))
    except MissingError as error:
        raise Missing(f"{', '.join(error.components)} lack what they need", str(error).splitlines()[-1]) from error
    for stage in recipe.stages:
        for component in stage.odds:  # the samples below may not contain all
            _degradation(component, places)
    with corpus() as (_, clips):
        plans = plan.Plans(recipe, clips, seed=0)
        for i in range(len(plans)):
            make_sample(plans[i])
    return f"{len(plans)} samples made"


def _given(places: Places) -> dict[str, Asset]:
    return {name: Asset(source) for name, source in places.assets}


def _gpu(_: str, places: Places) -> str:
    import torch

    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        build = f"torch {torch.__version__} ({f'CUDA {torch.version.cuda}' if torch.version.cuda else 'a CPU build'})"
        if Path("/dev/nvidia0").exists():
            raise RuntimeError(f"there is an NVIDIA GPU, but {build} says: {error}") from error
        raise Missing(f"no NVIDIA GPU, {build}", "not needed: everything also runs on CPUs, slower") from error
    gpus = []
    for index in range(torch.cuda.device_count()):
        ones = torch.ones(256, 256, device=f"cuda:{index}")
        if float((ones @ ones)[0, 0]) != 256:
            raise ArithmeticError(f"GPU {index} multiplies wrongly")
        properties = torch.cuda.get_device_properties(index)
        gpus.append(f"{properties.name} with {properties.total_memory / 2**30:.0f} GiB")
    return f"{', '.join(gpus)} (torch {torch.__version__})"


def _storage(which: str, places: Places) -> str:
    if which == "s3":
        return _s3()
    if not places.out:
        raise Missing("not tried", "give --out PLACE, the folder or URL where results are to go")
    name = f"doctor-{uuid.uuid4().hex[:8]}.txt"
    with published(places.out, name) as uri:
        fs, path = storage.file_system(uri)
        fs.invalidate_cache()
        listed = [str(entry).rpartition("/")[2] for entry in fs.ls(path.rpartition("/")[0], detail=False)]
        if fs.cat_file(path) != name.encode() or name not in listed:
            raise OSError(f"{places.out}: a file that was written is read or listed differently")
    return f"{places.out}: written, read, listed, deleted"


def _s3() -> str:
    fsspec.get_filesystem_class("s3")
    credentials = import_module("botocore.session").Session().get_credentials()
    if credentials is None:
        fix = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (and AWS_ENDPOINT_URL if not Amazon's)"
        raise Missing(f"s3fs {version('s3fs')} finds no credentials", fix)
    variables = ", ".join(sorted(name for name in os.environ if name.startswith("AWS_")))
    return (
        f"s3fs {version('s3fs')}, credentials from {credentials.method}; "
        f"variables set: {variables or 'none'}; --out s3://BUCKET/DIR tries them"
    )


def _clips(_: str, places: Places) -> str:
    """Read a second of the first, the last and some random recordings of each kind."""
    if not places.clips:
        raise Missing("not tried", "give --clips MANIFEST, the clips.parquet that `speechdistill ingest` wrote")
    manifest_path.check(places.clips)
    clips = Clips.read(places.clips)
    pools = {"speech": clips.speech, "noise": clips.noise, "rir": clips.rir}
    rng, tried = np.random.default_rng(), 0
    for pool in filter(len, pools.values()):
        for index in {0, len(pool) - 1, *rng.integers(len(pool), size=4).tolist()}:
            clip = pool[index]
            audio.load(clip.uri, 0, min(clip.num_samples, SAMPLE_RATE))
            tried += 1
    if not len(clips.speech):
        raise UserError(f"{places.clips} has no speech", "ingest some with --speech DIR")
    return f"{', '.join(f'{len(pool):,} {kind}' for kind, pool in pools.items())}; {tried} recordings read"


def _tracking(_: str, places: Places) -> str:
    uri = tracking_uri(places.out or ".")
    file = database.file_of(uri)
    if not os.environ.get("MLFLOW_TRACKING_URI") and not (places.out and file and file.exists()):
        return "mlflow.db in each run's folder, since MLFLOW_TRACKING_URI is not set"
    if file:
        database.check(uri)
        return _sqlite(file)
    if not uri.startswith(("http://", "https://")):
        raise Missing(f"not tried: {uri} is neither http(s) nor sqlite", "look for the run there after a small job")
    try:
        urllib.request.urlopen(f"{re.sub('//[^/@]*@', '//', uri).rstrip('/')}/health", timeout=10).close()
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            raise
        return f"{uri} answers and asks for credentials, which were not tried"
    return f"{uri} answers"


def _sqlite(path: Path) -> str:
    is_new = not path.exists()
    with closing(sqlite3.connect(path, timeout=5)) as opened:
        opened.execute("BEGIN IMMEDIATE")
        opened.rollback()
    if is_new:
        path.unlink(missing_ok=True)
    return f"{path} can be written"


def _demo(_: str, places: Places) -> str:
    from speechdistill.data.corpora import espeak

    with tempfile.TemporaryDirectory() as folder:
        seconds = audio.probe(next(espeak.rows(folder, 1))["uri"]).duration_s
    return f"espeak-ng spoke {seconds:.1f} s"


def _torchaudio(_: str, places: Places) -> str:
    try:
        import_module("torchaudio").functional.resample(import_module("torch").zeros(1, 160), 16_000, 8_000)
    except Exception as error:  # a build for another torch raises OSError
        reason = "not installed" if isinstance(error, ModuleNotFoundError) else f"does not load ({error})"
        raise Missing(reason, "not needed: only teacher squim reads a file of it") from error
    return f"torchaudio {version('torchaudio')}, of which teacher squim reads a file"


TRIALS: dict[str, Callable[[str, Places], str]] = {
    "machine": _machine,
    "teacher": _teacher,
    "degradation": _degradation,
    "recipe": _recipe,
    "format": lambda suffix, places: format_trial(suffix),
    "gpu": _gpu,
    "storage": _storage,
    "clips": _clips,
    "tracking": _tracking,
    "demo": _demo,
    "torchaudio": _torchaudio,
}
