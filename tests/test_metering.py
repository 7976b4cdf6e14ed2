"""Work is metered in seconds, joules and money, by the processor's counters where it has them."""

from pathlib import Path

import pytest

from modelyard.clock import ManualClock, SystemClock
from modelyard.metering import Meter, Metered
from modelyard.prices import load_prices

RANGE_UJ = 1_000_000_000


def _zone(powercap: Path, number: int, energy_uj: int | str) -> Path:
    """One processor package, as Linux shows it."""
    zone = powercap / f"intel-rapl:{number}"
    zone.mkdir(parents=True, exist_ok=True)
    (zone / "energy_uj").write_text(f"{energy_uj}\n")
    (zone / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
    return zone


def test_seconds_and_money_are_those_of_the_clock(tmp_path: Path) -> None:
    clock = ManualClock(start_s=100.0)
    clock.advance(5, cpu_s=5)  # before the meter was made
    core = load_prices()["cpu-core"]
    meter = Meter(load_prices(), clock, powercap=tmp_path / "none")
    clock.advance(10, cpu_s=36)
    assert meter.read() == Metered(
        wall_s=10,
        cpu_s=36,
        energy_j=36 * core.busy_power_w,
        energy_source="estimated",
        cost_usd=core.price_usd_per_hour / 100,
    )
    clock.advance(1, cpu_s=0)
    assert meter.read().wall_s == 11


def test_energy_is_the_sum_of_the_packages_counters(tmp_path: Path) -> None:
    _zone(tmp_path, 0, 1_000_000)
    _zone(tmp_path, 1, 500)
    _zone(tmp_path / "intel-rapl:0", 0, 900_000)  # a part of the first package: already in its sum
    meter = Meter(load_prices(), ManualClock(), powercap=tmp_path)
    _zone(tmp_path, 0, 3_000_000)
    _zone(tmp_path, 1, 1_000_500)
    spent = meter.read()
    assert spent.energy_source == "measured"
    assert spent.energy_j == pytest.approx(3.0)


def test_a_counter_that_wrapped_is_carried_over(tmp_path: Path) -> None:
    _zone(tmp_path, 0, RANGE_UJ - 2_000_000)
    meter = Meter(load_prices(), ManualClock(), powercap=tmp_path)
    _zone(tmp_path, 0, 1_000_000)
    assert meter.read().energy_j == pytest.approx(3.0)


@pytest.mark.parametrize("unreadable", ["", "not a number"])
def test_a_counter_that_cannot_be_read_makes_an_estimate(tmp_path: Path, unreadable: str) -> None:
    zone = _zone(tmp_path, 0, unreadable)
    assert Meter(load_prices(), ManualClock(), powercap=tmp_path).read().energy_source == "estimated"
    (zone / "energy_uj").write_text("5\n")
    meter = Meter(load_prices(), ManualClock(), powercap=tmp_path)
    (zone / "energy_uj").unlink()  # gone while the work was going on
    assert meter.read().energy_source == "estimated"


def test_sums_say_where_their_energy_comes_from() -> None:
    measured = Metered(wall_s=1, cpu_s=2, energy_j=3, energy_source="measured", cost_usd=4)
    estimated = Metered(wall_s=10, cpu_s=20, energy_j=30, energy_source="estimated", cost_usd=40)
    assert measured + estimated == Metered(wall_s=11, cpu_s=22, energy_j=33, energy_source="mixed", cost_usd=44)
    assert (measured + measured).energy_source == "measured"


def test_a_gpu_is_paid_for_every_second_it_is_held(tmp_path: Path) -> None:
    clock, prices = ManualClock(), load_prices()
    meter = Meter(prices, clock, powercap=tmp_path / "none", gpu=True)

    clock.advance(3600, cpu_s=60)

    core, gpu = prices["cpu-core"], prices["gpu"]
    spent = meter.read()
    assert spent.wall_s == 3600
    assert spent.cost_usd == pytest.approx(core.price_usd_per_hour / 60 + gpu.price_usd_per_hour)
    assert spent.energy_j == pytest.approx(60 * core.busy_power_w + 3600 * gpu.busy_power_w)


def test_the_systems_clock_never_goes_back() -> None:
    clock = SystemClock()
    before = clock.monotonic_s(), clock.cpu_s()
    sum(range(10_000))
    assert clock.monotonic_s() >= before[0]
    assert clock.cpu_s() >= before[1]
