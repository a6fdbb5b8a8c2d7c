"""One local Ray for the whole session, and the real audio beside the checkout where there is some."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side: threads of theirs would wait for each other
# Ray's workers import what tests send them by the names of the helpers and of the test files.
TESTS = Path(__file__).parent
FOLDERS = [TESTS, *sorted({file.parent for file in TESTS.glob("*/test_*.py")})]
os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, FOLDERS), *filter(None, [os.environ.get("PYTHONPATH")])])

STARTED = {"local_ray": "ray", "server": "server", "healthy": "server", "sick": "server"}
"""The marks of tests with these fixtures: an MLflow, and the doctor's trials, are other programs."""

REAL_AUDIO = Path(os.environ.get("AUDIO", Path(__file__).parents[2] / "shared" / "data"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what its fixtures start; tests of `faults/` start clusters."""
    for item in items:
        started = {STARTED[name] for name in getattr(item, "fixturenames", ()) if name in STARTED}
        for mark in started | ({"ray"} if "faults" in item.path.parts else set()):
            item.add_marker(mark)


@pytest.fixture(autouse=True)
def own_package_first() -> Iterator[None]:
    """MLflow puts the code stored with a model before everything else that can be imported, here and in children."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture(autouse=True)
def no_ray_without_its_mark(pytestconfig: pytest.Config) -> Iterator[None]:
    """In `make quick`, fail the test that starts a Ray in this process: it lacks the mark."""
    yield
    ray = sys.modules.get("ray")
    if "not ray" in pytestconfig.option.markexpr and ray is not None and ray.is_initialized():
        ray.shutdown()  # so that only this test fails
        pytest.fail("a test that starts a Ray has the mark `ray` or the fixture `local_ray`")


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    import ray

    from speechdistill.engine import cluster

    cluster.connect()
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def real_audio() -> Path:
    if not REAL_AUDIO.is_dir():
        pytest.skip(f"real recordings are not at {REAL_AUDIO}")
    return REAL_AUDIO
