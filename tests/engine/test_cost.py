"""The estimated cost of a run."""

from dataclasses import replace

import pytest

from speechdistill.engine import cost, place
from speechdistill.engine.flow import Trial
from speechdistill.engine.monitor import Work
from speechdistill.engine.pools import Pool
from speechdistill.engine.stages import Stage
from speechdistill.io.options import OptionError
from speechdistill.labelling.samples import DEGRADED, TAUGHT


def trial() -> Trial:
    stages = (
        Stage(name="degrade", make=list, adds=DEGRADED, pool=Pool(4)),
        Stage(name="teach", make=list, adds=TAUGHT, pool=Pool(2, num_gpus=0.5)),
    )
    work = {"degrade": Work(200, 40.0, 36.0), "teach": Work(200, 30.0, 12.0), "write": Work(200, 4.0, 2.0)}
    return Trial(num_ids=200, labelled=190, work=work, size_bytes=200 * 120_000, stages=stages)


def test_the_trial_is_scaled_to_the_run() -> None:
    estimate = cost.estimate(trial(), 7200 * 100, place.amounts("--price", "cpu=0.05, gpu=2"))
    assert estimate.cpu_hours == pytest.approx(50)  # a quarter of a second for each
    assert estimate.gpu_hours == pytest.approx(15)  # two actors share a GPU
    assert estimate.hours == pytest.approx(15)  # two teachers at 0.15 s; four degrading actors need 10
    assert estimate.output_gb == pytest.approx(86.4)
    assert estimate.money == pytest.approx(50 * 0.05 + 15 * 2)
    assert estimate.trial_rejected == 10


@pytest.mark.parametrize("text", [None, "cpu=1", "gpu=1"])
def test_money_is_not_known_where_hours_have_no_price(text: str | None) -> None:
    assert cost.estimate(trial(), 100, place.amounts("--price", text)).money is None


def test_hours_that_are_not_spent_need_no_price() -> None:
    on_cpus = replace(trial(), stages=tuple(replace(stage, pool=Pool(stage.pool.actors)) for stage in trial().stages))
    estimate = cost.estimate(on_cpus, 7200 * 100, place.amounts("--price", "cpu=0.05"))
    assert estimate.money == pytest.approx(50 * 0.05)


@pytest.mark.parametrize("text", ["cpu", "0.05", "cpu=,gpu=1", "tpu=1", "cpu=-1", "cpu=nan", "", "cpu=1,CPU=2"])
def test_an_amount_that_cannot_be_read_is_refused_with_the_form(text: str) -> None:
    with pytest.raises(OptionError, match="--price"):
        place.amounts("--price", text)


def test_only_what_is_named_has_an_amount() -> None:
    assert place.amounts("--grow-to", "gpu=8") == {"gpu": 8.0}
    assert place.amounts("--grow-to", None) == {}
