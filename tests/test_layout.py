"""The house rules: wings import downwards, families keep apart, libraries stay in their wings."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "speechdistill"

# The whole rule: a file imports files of its own wing, never in a circle, or of a lower floor.
FLOORS = (
    {"io", "metrics"},  # import nothing of other wings
    {"data", "engine", "tracking"},
    {"models"},
    {"labelling", "training", "comparing"},
    {"commands"},
    {"cli", "__init__"},
    {"__main__"},
)
FAMILIES = ("data/corpora", "data/degradations", "models/teachers", "training/recipes")
ONLY_IN = {  # anywhere in a file
    "ray": ("engine/", "training/"),
    "mlflow": ("tracking/", "models/served.py"),
    "tyro": ("commands/", "cli.py"),
}
AT_THE_TOP_ONLY_IN = {"torch": ("models/", "training/")}  # elsewhere inside functions, so that `--help` is quick
NEVER_AT_THE_TOP = {"matplotlib", "noisereduce", "onnxruntime", "pyroomacoustics", "transformers", "huggingface_hub"}

SOURCES = {str(path.relative_to(PACKAGE)): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}
_DOTTED = re.compile(r"\bspeechdistill(?:\.\w+)+")


class File:
    """What a file of the package imports: `modules` by dotted name, `at_the_top` those that importing it imports.

    Strings that name a module of ours count, whatever is done with them; an f-string, or `__name__` or `__path__` of a
    package, stands for every file of a folder.
    """

    def __init__(self, source: str) -> None:
        tree = ast.parse(source)
        nodes = list(ast.walk(tree))
        docstrings = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
        texts = [node.value for node in nodes if isinstance(node, ast.Constant) and id(node) not in docstrings]
        code = "\n".join(text for text in texts if isinstance(text, str))
        self.is_relative = any(map(_is_relative, nodes))
        self.at_the_top = {name for node in _executed(tree.body) for name in _imported(node)}
        self.modules = {name for node in nodes for name in _imported(node)}
        self.in_strings = set(_DOTTED.findall(code))
        self.folders = set(re.findall(r"\bspeechdistill(?:\.\w+)*(?=\.$)", code, re.MULTILINE))
        for node in (node for node in nodes if isinstance(node, ast.Attribute)):
            if node.attr in ("__name__", "__path__") and isinstance(node.value, ast.Name):
                self.folders |= {module for module in self.modules if module.endswith(f".{node.value.id}")}


def _imported(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def _executed(body: list[ast.stmt]) -> Iterator[ast.AST]:
    """The statements that run when a file is imported: all but functions, and what is for the type checker."""
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        yield node
        for field in ("body", "orelse", "finalbody", "handlers"):
            yield from _executed(getattr(node, field, []))


def _is_relative(node: ast.AST) -> bool:
    """Whether an import is relative, or would be: a module's name made from the file's own."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
        return any(isinstance(part, ast.Name) and part.id in ("__name__", "__package__") for part in ast.walk(node))
    return isinstance(node, ast.ImportFrom) and node.level > 0


_file = cache(File)


def resolved(name: str, sources: Mapping[str, str]) -> str | None:
    """The file that a dotted name is, or is a name in; None if it is not below the package."""
    parts = name.split(".")
    for depth in range(len(parts), 1, -1) if parts[0] == "speechdistill" else ():
        stem = "/".join(parts[1:depth])
        for path in (f"{stem}.py", f"{stem}/__init__.py"):
            if path in sources:
                return path
    return None


def ours(path: str, file: File, sources: Mapping[str, str]) -> set[str]:
    """The files of the package that a file imports."""
    found = {resolved(name, sources) for name in file.in_strings}
    own = [name for name in file.modules if name.partition(".")[0] == "speechdistill"]
    found |= {resolved(name, sources) or "__init__.py" for name in own}
    for folder in ("/".join(name.split(".")[1:]) for name in file.folders):
        found |= {other for other in sources if other.rpartition("/")[0] == folder}
    return {other for other in found if other is not None} - {path}


def floor(path: str) -> int:
    wing = path.partition("/")[0].removesuffix(".py")
    return next((number for number, wings in enumerate(FLOORS) if wing in wings), -1)


def faults(sources: Mapping[str, str]) -> list[str]:
    """Everything in the package that is against the rules, a line each."""
    files = {path: _file(source) for path, source in sources.items()}
    edges = {path: ours(path, file, sources) for path, file in files.items()}
    lines = [f"{path} is in no wing" for path in sources if floor(path) < 0]
    lines += [f"{path} has a relative import" for path, file in files.items() if file.is_relative]
    lines += [
        f"{path} imports {other}, which is not below it"
        for path, others in edges.items()
        for other in others
        if floor(other) >= floor(path) and other.partition("/")[0] != path.partition("/")[0]
    ]
    lines += [
        f"{path} imports {other} of its family"
        for family in FAMILIES
        for path, others in edges.items()
        for other in others
        if path.startswith(f"{family}/") and other.startswith(f"{family}/") and not other.endswith("__init__.py")
    ]
    left = dict(edges)
    while free := {path for path, others in left.items() if not others & left.keys()}:
        left = {path: others for path, others in left.items() if path not in free}
    lines += [f"{path} imports itself through others" for path in left]
    for path, file in files.items():
        tops, roots = ({name.partition(".")[0] for name in names} for names in (file.at_the_top, file.modules))
        limits = [(roots, *limit) for limit in ONLY_IN.items()]
        limits += [(tops, *limit) for limit in AT_THE_TOP_ONLY_IN.items()]
        lines += [
            f"{path} imports {name}" for names, name, wings in limits if name in names and not path.startswith(wings)
        ]
        lines += [f"{path} imports {name} at its top" for name in tops & NEVER_AT_THE_TOP]
    lines += [f"{path} is not empty" for path in sources if path.endswith("/__init__.py") and sources[path]]
    return lines


def test_the_package_keeps_the_rules() -> None:
    assert faults(SOURCES) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("io/x.py", "from speechdistill.metrics import correlation"),
        ("data/x.py", "from speechdistill.models.label import Label"),
        ("engine/x.py", "import speechdistill.tracking.run"),
        ("tracking/x.py", "from speechdistill import engine"),
        ("models/x.py", "def f():\n    from speechdistill.training import loop"),
        ("models/x.py", "from speechdistill import load"),
        ("labelling/x.py", "from speechdistill.comparing import page"),
        ("training/x.py", "from . import loop"),
        ("training/x.py", "from ..commands import prune"),
        ("data/x.py", "import_module('speechdistill.models.load')"),
        ("data/x.py", "NAME = 'speechdistill.models.load'\nimport_module(NAME)"),
        ("data/x.py", "import_module(f'speechdistill.models.teachers.{name}')"),
        ("data/x.py", "import_module(f'{__name__}.clips')"),
        ("data/x.py", "from speechdistill.models import teachers\nimport_module(f'{teachers.__name__}.{name}')"),
        ("metrics/x.py", "monkeypatch.setattr('speechdistill.engine.flow.run', None)"),
        ("metrics/x.py", "resources.files('speechdistill.data') / 'table.csv'"),
        ("metrics/x.py", "import speechdistill\nspeechdistill.io.audio.load('a.wav')"),
        ("metrics/x.py", "code = 'from speechdistill.io import audio'"),
        ("models/teachers/x.py", "from speechdistill.models.teachers import nisqa"),
        ("models/teachers/x.py", "from speechdistill.models.load import load_teacher"),  # which imports the family
        ("io/storage.py", "from speechdistill.io import table"),  # which imports storage
        ("commands/x.py", "import ray"),
        ("models/x.py", "def f():\n    from mlflow import pyfunc"),
        ("engine/x.py", "importlib.import_module('tyro')"),
        ("data/x.py", "import torch"),
        ("data/x.py", "try:\n    from torch import nn\nexcept ImportError:\n    nn = None"),
        ("models/x.py", "import transformers"),
        ("utils/x.py", ""),
        ("x.py", ""),
        ("io/__init__.py", "from speechdistill.io.table import read"),
    ],
)
def test_a_wrong_import_of_any_sort_is_found(path: str, line: str) -> None:
    planted = {**SOURCES, path: SOURCES.get(path, "") + f"\n{line}\n"}
    assert any(fault.startswith(path) for fault in faults(planted)), faults(planted)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("data/x.py", "from speechdistill.io import table"),
        ("data/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"),
        ("data/x.py", "def f():\n    import torch"),
        ("engine/x.py", "import ray"),
        ("tracking/x.py", "TAG = 'speechdistill.run'"),  # is no module
        ("models/x.py", '"""See `speechdistill.commands.score`."""'),
    ],
)
def test_a_right_import_is_none(path: str, line: str) -> None:
    assert faults({**SOURCES, path: f"{line}\n"}) == []


def test_no_import_or_string_names_a_module_that_is_gone() -> None:
    """Also in code that tests run in other processes, and in the targets of `monkeypatch.setattr`."""
    known = {wing for wings in FLOORS for wing in wings} | {"load"}
    for path in (path for folder in ("tests", "jobs", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        if "fixtures" not in path.parts and path != Path(__file__):
            named = re.findall(r"(?:from |import |[\"'])speechdistill\.(\w+)", path.read_text())
            assert set(named) <= known, path


def test_the_first_file_of_each_wing_says_what_the_wing_is_for() -> None:
    for wing in (wing for floor in FLOORS[:-2] for wing in floor):
        first = min(path for path in SOURCES if path.startswith(f"{wing}/") and not path.endswith("__init__.py"))
        assert SOURCES[first].startswith(f"# {wing}/: "), first


def test_tests_mirror_the_wings() -> None:
    wings = {wing for floor in FLOORS[:-2] for wing in floor}
    folders = {path.parent.name for path in (ROOT / "tests").rglob("test_*.py")} - {"tests", "faults"}
    assert folders == wings


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
