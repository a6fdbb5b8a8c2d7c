"""The files that take a run from a laptop to a cluster: valid, of one mind about versions, and closed to strangers."""

import copy
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import botocore.session
import botocore.validate
import jsonschema
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config

from configs import option_names
from speechdistill.commands.pseudolabel import Pseudolabel

ROOT = Path(__file__).parents[1]
LOCK = (ROOT / "requirements.lock").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()
CLUSTER = yaml.safe_load((ROOT / "cluster.yaml").read_text())
RAYJOB = yaml.safe_load((ROOT / "kuberay.yaml").read_text())
PINS = dict(re.findall(r"^([\w.-]+)==(\S+)", LOCK, re.MULTILINE))
DIRECT = [Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]
WEIGHTS = re.search(r"pip install (--no-deps distillmos==\S+)", LOCK)[1]
PYTHON = re.search(r"Python (3\.\d+)\.", LOCK)[1]


def check_cluster(config: dict[str, Any]) -> None:
    """Ray's own check of a `ray up` file, and EC2's of its machines, which Ray hands on unread."""
    validate_config(prepare_config(copy.deepcopy(config)))
    model = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    for kind in config["available_node_types"].values():
        machine = {**kind["node_config"], "MinCount": 1, "MaxCount": 1}
        report = botocore.validate.ParamValidator().validate(machine, model).generate_report()
        if report:
            raise ValueError(report)


def check_rayjob(config: dict[str, Any]) -> None:
    schema = json.loads((ROOT / "tests" / "fixtures" / "rayjob.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(config)


def pods() -> dict[str, dict[str, Any]]:
    spec = RAYJOB["spec"]["rayClusterSpec"]
    groups = {"head": spec["headGroupSpec"]} | {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    return {name: group["template"]["spec"]["containers"][0] for name, group in groups.items()}


def ray_starts(commands: list[str]) -> list[list[str]]:
    return [shlex.split(command) for command in commands if " start " in command]


# The lock


def test_every_direct_dependency_has_a_pin_that_satisfies_it() -> None:
    for need in DIRECT:
        pin = PINS.get(canonicalize_name(need.name))
        assert pin, f"{need.name} has no pin in requirements.lock: make lock"
        assert need.specifier.contains(pin), f"requirements.lock has {need.name} {pin}, which is not {need}: make lock"


def test_the_pins_are_what_the_tests_run_with() -> None:
    names = [name for need in DIRECT if (name := canonicalize_name(need.name)) in PINS]
    here = {name: Version(version(name)).public for name in names}
    differs = {name: f"{PINS[name]}, here {found}" for name, found in here.items() if PINS[name] != found}
    ahead = {name: told for name, told in differs.items() if Version(PINS[name]) > Version(here[name])}
    assert not ahead, f"requirements.lock names versions newer than any that the tests ran with here: {ahead}"
    if differs:
        pytest.skip(f"newer packages here than in requirements.lock, which `make lock` would take over: {differs}")


def test_make_lock_pins_all_that_is_needed_without_a_build(tmp_path: Path) -> None:
    made = tmp_path / "requirements.lock"
    make = ["make", "--silent", "--assume-old=setup", f"BIN={Path(sys.executable).parent}", f"LOCKED={made}", "lock"]
    subprocess.run(make, cwd=ROOT, check=True)
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", made.read_text(), re.MULTILINE))
    assert {canonicalize_name(need.name) for need in DIRECT} <= pins.keys()
    assert "setuptools" in pins, "what torch itself needs is missing"
    assert "pytest" not in pins and not any("+" in pin for pin in pins.values())
    if all(Version(version(name)).public == pin for name, pin in PINS.items() if name in pins):
        assert made.read_text() == LOCK, "requirements.lock is out of date: make lock"


# cluster.yaml


def test_cluster_yaml_is_valid() -> None:
    check_cluster(CLUSTER)


def _misspelt_field(config: dict[str, Any]) -> None:
    config["idle_timeout_minuts"] = 5


def _misspelt_node_field(config: dict[str, Any]) -> None:
    config["available_node_types"]["gpu"]["max_worker"] = 4


def _wrong_type(config: dict[str, Any]) -> None:
    config["available_node_types"]["cpu"]["min_workers"] = "none"


def _unknown_head(config: dict[str, Any]) -> None:
    config["head_node_type"] = "haed"


def _more_minimum_than_maximum(config: dict[str, Any]) -> None:
    config["available_node_types"]["cpu"]["min_workers"] = 100


def _misspelt_machine_field(config: dict[str, Any]) -> None:
    config["available_node_types"]["cpu"]["node_config"]["InstanceTyp"] = "m7i.large"


def _wrong_machine_value(config: dict[str, Any]) -> None:
    config["available_node_types"]["cpu"]["node_config"]["SecurityGroupIds"] = "sg-1"


@pytest.mark.parametrize(
    "break_it",
    [
        _misspelt_field,
        _misspelt_node_field,
        _wrong_type,
        _unknown_head,
        _more_minimum_than_maximum,
        _misspelt_machine_field,
        _wrong_machine_value,
    ],
)
def test_the_check_of_cluster_yaml_can_fail(break_it: Callable[[dict[str, Any]], None]) -> None:
    config = copy.deepcopy(CLUSTER)
    break_it(config)
    with pytest.raises((ValueError, jsonschema.ValidationError)):
        check_cluster(config)


def test_workers_scale_from_zero_and_the_head_lends_no_cpu() -> None:
    kinds = CLUSTER["available_node_types"]
    workers = [kind for name, kind in kinds.items() if name != CLUSTER["head_node_type"]]
    assert len(workers) == 2 and all(kind["min_workers"] == 0 < kind["max_workers"] for kind in workers)
    assert sum(kind["max_workers"] for kind in workers) <= CLUSTER["max_workers"]
    assert kinds[CLUSTER["head_node_type"]]["resources"]["CPU"] == 0
    assert CLUSTER["idle_timeout_minutes"] > 0 and CLUSTER["provider"]["cache_stopped_nodes"] is False


def test_every_ray_start_wants_the_token_and_the_token_is_on_every_node() -> None:
    starts = ray_starts(CLUSTER["head_start_ray_commands"]) + ray_starts(CLUSTER["worker_start_ray_commands"])
    assert len(starts) == 2 and all("RAY_AUTH_MODE=token" in words for words in starts)
    assert CLUSTER["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert any("RAY_AUTH_MODE=token" in command for command in CLUSTER["initialization_commands"])


def test_only_ssh_reaches_the_head_and_nothing_is_opened_to_the_world() -> None:
    (head,) = ray_starts(CLUSTER["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in head
    for kind in CLUSTER["available_node_types"].values():  # without a group of its own Ray opens port 22 to everyone
        assert kind["node_config"]["SecurityGroupIds"] == [CLUSTER["metadata"]["security_group"]]
        assert kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"}
    assert "0.0.0.0" not in (ROOT / "cluster.yaml").read_text()


# kuberay.yaml


def test_kuberay_yaml_is_valid() -> None:
    check_rayjob(RAYJOB)
    assert yaml.safe_load(RAYJOB["spec"]["runtimeEnvYAML"])["working_dir"].endswith(".zip")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "rayClusterSpec", "enableInTreeAutoscalling"), True),
        (("spec", "rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("spec", "rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 0, "minReplicas"), "0"),
        (("spec", "rayClusterSpec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "envfrom"), []),
    ],
)
def test_the_check_of_kuberay_yaml_can_fail(path: tuple[str | int, ...], value: Any) -> None:
    config = json.loads(json.dumps(RAYJOB))
    level: Any = config
    for key in path[:-1]:
        level = level[key]
    level[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check_rayjob(config)


def test_kuberay_scales_from_zero_with_a_token_and_unprivileged_pods() -> None:
    spec = RAYJOB["spec"]["rayClusterSpec"]
    assert spec["enableInTreeAutoscaling"] is True and spec["authOptions"] == {"mode": "token"}
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert [group["minReplicas"] for group in spec["workerGroupSpecs"]] == [0, 0]
    assert pods()["gpu"]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    for pod in pods().values():
        assert pod["securityContext"]["runAsNonRoot"] and not pod["securityContext"]["allowPrivilegeEscalation"]
        assert pod["envFrom"] == [{"secretRef": {"name": "speechdistill"}}]


def test_the_job_of_kuberay_exists_with_its_options_and_is_told_what_its_cluster_may_become() -> None:
    spec = RAYJOB["spec"]["rayClusterSpec"]
    python, job, *words = shlex.split(RAYJOB["spec"]["entrypoint"])
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert python == "python" and (ROOT / job).is_file()
    known = {f"--{name.replace('_', '-')}" for name in option_names(Pseudolabel(clips="", out=""))}
    assert options.keys() <= known
    groups = [(group["groupName"], group["maxReplicas"]) for group in spec["workerGroupSpecs"]]
    sizes = [(number, pods()[name]["resources"]["limits"]) for name, number in groups]
    cpus = sum(number * int(size["cpu"]) for number, size in sizes)
    gpus = sum(number * int(size.get("nvidia.com/gpu", 0)) for number, size in sizes)
    assert options["--grow-to"] == f"cpu={cpus},gpu={gpus}"


# All of them


def test_nodes_install_the_lock_then_the_weights_and_nothing_else() -> None:
    commands = [line.removeprefix("RUN ") for line in DOCKERFILE.splitlines() if line.startswith("RUN ")]
    for named in (commands, CLUSTER["setup_commands"], CLUSTER["head_setup_commands"]):
        for command in (command for command in named if "pip install" in command):
            assert "requirements.lock" in command or WEIGHTS in command, command
    for named in (commands, CLUSTER["setup_commands"]):
        assert [c for c in named if "--requirement" in c and "requirements.lock" in c], named
        assert [c for c in named if WEIGHTS in c], named
    assert CLUSTER["file_mounts"]["~/requirements.lock"] == "requirements.lock"
    assert "COPY requirements.lock " in DOCKERFILE
    assert f"install --quiet {WEIGHTS}" in (ROOT / "Makefile").read_text(), "the tests run with other weights"


def test_all_name_the_same_python_and_ray() -> None:
    assert re.search(r"^FROM python:(\d+\.\d+)-slim", DOCKERFILE, re.MULTILINE)[1] == PYTHON
    assert any(f"--python {PYTHON} " in command for command in CLUSTER["setup_commands"])
    assert RAYJOB["spec"]["rayClusterSpec"]["rayVersion"] == PINS["ray"]
    tag = f"speechdistill:ray{PINS['ray']}-py{PYTHON.replace('.', '')}"
    assert {pod["image"] for pod in pods().values()} == {f"REGISTRY/{tag}-cpu", f"REGISTRY/{tag}-cuda"}
    assert f"{tag}-cpu" in DOCKERFILE and f"{tag}-cuda" in DOCKERFILE


def test_the_image_has_no_code_and_no_root() -> None:
    lines = DOCKERFILE.splitlines()
    copied = [line for line in lines if line.startswith(("COPY", "ADD"))]
    assert copied == ["COPY requirements.lock /opt/speechdistill/"]
    assert [line for line in lines if line.startswith("USER")] == ["USER 1000"]
    last_run = max(i for i, line in enumerate(lines) if line.startswith("RUN"))
    assert lines.index("USER 1000") > last_run


def test_git_and_ray_take_the_files_along() -> None:
    files = ["requirements.lock", "Dockerfile", "cluster.yaml", "kuberay.yaml", "tests/fixtures/rayjob.schema.json"]
    ignored = subprocess.run(["git", "check-ignore", "--no-index", *files], cwd=ROOT, capture_output=True, text=True)
    assert ignored.returncode == 1 and not ignored.stdout, f"ignored by git, and so by ray job submit: {ignored.stdout}"
