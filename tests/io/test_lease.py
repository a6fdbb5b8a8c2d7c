"""Leases: one writer at a time, through kills, claimants at once, clocks that differ and suspended holders."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from leases import claimed_by, dead, holder, of_another_machine
from speechdistill.io import lease
from speechdistill.io.lease import LeaseError, held


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_BEAT_S", 0.1)
    monkeypatch.setattr(lease, "_DEAD_S", 0.6)


def test_the_second_is_refused_with_who_holds_it_and_since_when(tmp_path: Path) -> None:
    with held(str(tmp_path), "ingest"):
        with pytest.raises(LeaseError) as refused, held(str(tmp_path), "pseudolabel"):
            pytest.fail("two hold it")
        assert f"{tmp_path} is in use by `speechdistill ingest` on " in str(refused.value)
        assert f"(process {os.getpid()}) since 2" in str(refused.value) and "another --out" in str(refused.value)


@pytest.mark.parametrize("ends", [None, KeyboardInterrupt, ValueError])
def test_it_is_released_however_its_holder_ends(tmp_path: Path, ends: type[BaseException] | None) -> None:
    for _ in range(2):
        try:
            with held(str(tmp_path / "out"), "ingest"):
                if ends:
                    raise ends
        except (KeyboardInterrupt, ValueError):
            pass
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_holder_of_this_machine_is_not_waited_for(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        with pytest.raises(LeaseError, match=rf"process {process.pid}\)"), held(str(tmp_path), "ingest"):
            pass
        process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its parent has not taken note yet
    with held(str(tmp_path), "ingest"):
        assert len(list(tmp_path.iterdir())) == 1


def test_a_holder_elsewhere_is_dead_once_it_was_not_renewed(tmp_path: Path, quick: None) -> None:
    (tmp_path / ".lease-000007").write_bytes(of_another_machine())
    with held(str(tmp_path), "ingest"):
        assert [path.name for path in tmp_path.iterdir()] == [".lease-000008"]


def test_a_holder_elsewhere_with_a_time_in_the_future_is_not_waited_for_until_then(tmp_path: Path, quick: None) -> None:
    file = tmp_path / ".lease-000007"
    file.write_bytes(of_another_machine())
    os.utime(file, (time.time() + 86_400,) * 2)
    with held(str(tmp_path), "ingest"):
        assert [path.name for path in tmp_path.iterdir()] == [".lease-000008"]


def test_a_holder_elsewhere_lives_while_it_is_renewed(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with held(str(tmp_path), "ingest"):
        monkeypatch.setattr(lease, "machine", lambda: "elsewhere")
        # This machine's clock is a day ahead of the store's.
        real = time.time
        monkeypatch.setattr(time, "time", lambda: real() + 86_400)
        for _ in range(3):
            with pytest.raises(LeaseError, match="speechdistill ingest"), held(str(tmp_path), "ingest"):
                pass


def test_what_a_killed_claimant_left_half_written_is_taken_over(tmp_path: Path, quick: None) -> None:
    (tmp_path / ".lease-000001").touch()
    with held(str(tmp_path), "ingest"):
        assert [path.name for path in tmp_path.iterdir()] == [".lease-000002"]


def test_of_claimants_at_once_exactly_one_takes_a_dead_lease_over(tmp_path: Path) -> None:
    folders = [tmp_path / str(i) for i in range(40)]
    for folder in folders[::2]:
        folder.mkdir()
        (folder / ".lease-000001").write_bytes(dead())
    assert claimed_by(2, [str(folder) for folder in folders]) == [1] * len(folders)


def test_a_holder_whose_lease_was_taken_over_is_stopped(tmp_path: Path, quick: None) -> None:
    with pytest.raises(LeaseError, match="taken over by another command"), held(str(tmp_path), "ingest") as mine:
        mine.check()
        (tmp_path / ".lease-000002").touch()
        (tmp_path / ".lease-000001").unlink()
        threading.Event().wait(60)
    assert [path.name for path in tmp_path.iterdir()] == [".lease-000002"]


def test_a_holder_that_was_suspended_looks_before_it_writes_on(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease, "_BEAT_S", 60.0)  # the thread has not run yet
    with held(str(tmp_path), "ingest") as mine:
        now = lease.now_s
        monkeypatch.setattr(lease, "now_s", lambda: now() + 100)
        mine.check()
        monkeypatch.setattr(lease, "now_s", lambda: now() + 200)
        (tmp_path / ".lease-000002").touch()
        with pytest.raises(LeaseError, match="taken over"):
            mine.check()
