"""The house rules: import direction, where third-party libraries may be imported, file rules."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "speechdistill"
FAMILIES = ("corpora", "degradations", "teachers", "students", "recipes")

# A module may import modules of lower tiers only; members of a family never import each other.
TIERS = (
    {"tar_files"},
    {"audio_files"},
    {"audio_decoders"},
    {"audio", "table", "isolate", "watch", "evaluate", "model_code", "paper", "weights_file"},
    {
        "assets",
        "espeak_ng",
        "onnx_denoisers",
        "file_cache",
        "clips",
        "shards",
        "event_log",
        "labels",
        "lanes",
        "global_norm",
        "metrics",
    },
    {"libopus", "mlflow_sender", "slim_encoder"},
    {"tracking"},
    {"students"},
    {"student_files"},
    {"registry"},
    {"speech_encoder"},
    {
        "corpora",
        "degradations",
        "teachers",
        "scorer",
        "encoder_scorer",
        "trained",
        "dnsmos",
        "released",
        "mlflow_model",
        "plan",
        "score",
        "cluster",
        "parts",
    },
    {"monitor", "samples", "degradation_recipes", "labeled", "listening_tests", "pruning"},
    {"flow", "trials", "batches", "models"},
    {"cost", "label_figures", "loop", "pools", "feature_batches", "validation", "judged"},
    {"features", "scoring"},
    {"comparison"},
    {"tables", "plots"},
    {"page"},
    {"recipes"},
    {"report", "preview"},
    {"doctor", "ingest", "promote", "pseudolabel", "train", "compare"},
    {"side_by_side"},
    {"launch"},
    {"train_students", "train_teacher", "prune"},
    {"cli"},
)
WITHIN_TIER = {
    ("plan", "degradations"),
    ("score", "teachers"),
    ("scorer", "teachers"),  # the family's contract
    ("teachers", "scorer"),  # what members share
    ("teachers", "dnsmos"),
    ("teachers", "released"),
    ("teachers", "encoder_scorer"),
    ("teachers", "trained"),
    ("trained", "scorer"),
    ("trained", "encoder_scorer"),
    ("mlflow_model", "trained"),
    ("encoder_scorer", "scorer"),
    ("dnsmos", "scorer"),
    ("dnsmos", "teachers"),  # the family's contract
    ("released", "scorer"),
    ("released", "teachers"),  # the family's contract
    ("mlflow_model", "teachers"),
}
ONLY_IN = {
    "ray": {"cluster", "monitor", "parts", "flow", "ingest", "train", "side_by_side", "launch"},
    "mlflow": {"mlflow_model", "mlflow_sender", "registry"},
    "tyro": {"cli"},
}
HEAVY = {
    "torch",
    "mlflow",
    "matplotlib",
    "pyroomacoustics",
    "noisereduce",
    "transformers",
    "onnxruntime",
    "huggingface_hub",
}
NEURAL = {  # are nothing without torch
    "students.conv_transformer",
    "teachers.distillmos",
    "teachers.nisqa",
    "teachers.squim",
    "teachers.utmos",
    "teachers.xlsr",
    "released",
    "speech_encoder",
    "encoder_scorer",
    "trained",
    "global_norm",
    "slim_encoder",
    "pruning",
    "scorer",
    "student_files",
    "loop",
    "validation",
    "recipes.distill",
    "recipes.teacher",
    "recipes.pruned",
    "train",
    "side_by_side",
    "launch",
    "mlflow_model",
}  # are nothing without torch, or MLflow


def modules() -> dict[str, Path]:
    files = PACKAGE.rglob("*.py")
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def tier(module: str) -> int:
    return next(i for i, names in enumerate(TIERS) if module.split(".")[0] in names)


def test_every_module_has_a_tier() -> None:
    names = {name.split(".")[0] for name in modules() if name not in ("__init__", "")}
    assert names == set().union(*TIERS)


@pytest.mark.parametrize("name", [n for n in modules() if n != "__init__"])
def test_imports_run_one_way(name: str) -> None:
    prefix = "speechdistill."
    known = set(modules())
    ours = {i.removeprefix(prefix) for i in imports(modules()[name]) if i.startswith(prefix)} & known
    room = name.split(".")[0]
    for other in ours:
        target = other.split(".")[0]
        if target == room and other in (room, name):
            continue  # a member may import its family's contract
        allowed = tier(other) < tier(name) or (room, target) in WITHIN_TIER
        assert allowed, f"{name} imports {other}, which is not below it"


@pytest.mark.parametrize(("library", "rooms"), ONLY_IN.items())
def test_frameworks_stay_in_their_rooms(library: str, rooms: set[str]) -> None:
    users = {name for name, path in modules().items() if any(i.split(".")[0] == library for i in imports(path))}
    assert users == rooms


def test_heavy_libraries_are_imported_where_they_are_used() -> None:
    for name, path in modules().items():
        heavy = {i.split(".")[0] for i in imports(path, top_level_only=True)} & HEAVY
        assert not heavy or name in NEURAL, f"{name} imports {heavy} at its top"


def test_platform_is_a_source_root_and_not_a_package() -> None:
    assert not (ROOT / "platform" / "__init__.py").exists()
    code = "import platform, speechdistill; print(platform.system())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "Linux"


def test_jobs_are_executable_and_not_named_after_a_library() -> None:
    for job in (ROOT / "jobs").glob("*.py"):
        assert job.read_text().startswith("#!/usr/bin/env python3\n"), job
        assert job.stat().st_mode & 0o100, f"{job} lacks its run bit"
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({job.stem!r}) is not None)"
        assert subprocess.run([sys.executable, "-c", code], cwd="/").returncode == 0, job


def test_schemas_stand_at_the_root_too() -> None:
    assert (ROOT / "schemas").resolve() == PACKAGE / "schemas"


def test_importing_the_package_is_light() -> None:
    code = "import sys, speechdistill; print([m for m in ('torch', 'ray', 'mlflow') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
