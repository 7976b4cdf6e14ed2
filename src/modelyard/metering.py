"""What a piece of work took: wall and CPU seconds, joules, money.

Energy is read from the processor's own counters (Linux powercap) where they can be read, and is otherwise an estimate from
CPU seconds that says so.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from modelyard.clock import Clock, SystemClock
from modelyard.prices import Device
from modelyard.schema import Frozen

POWERCAP = Path("/sys/class/powercap")


class Metered(Frozen, frozen=True):
    """Seconds, joules and money of one piece of work."""

    wall_s: Annotated[float, Meta(ge=0)]
    cpu_s: Annotated[float, Meta(ge=0)]
    energy_j: Annotated[float, Meta(ge=0)]
    energy_source: Literal["measured", "estimated", "mixed"]
    cost_usd: Annotated[float, Meta(ge=0)]

    def __add__(self, other: "Metered") -> "Metered":
        source = self.energy_source if self.energy_source == other.energy_source else "mixed"
        return Metered(
            wall_s=self.wall_s + other.wall_s,
            cpu_s=self.cpu_s + other.cpu_s,
            energy_j=self.energy_j + other.energy_j,
            energy_source=source,
            cost_usd=self.cost_usd + other.cost_usd,
        )


class Meter:
    """Meters from `start` on. Money is CPU seconds at the price of one core: what the work would cost when rented by the core.

    Not thread-safe; one owner.
    """

    def __init__(self, prices: Mapping[str, Device], clock: Clock | None = None, powercap: Path = POWERCAP) -> None:
        self._core = prices["cpu-core"]
        self._clock = clock or SystemClock()
        self._zones = _energy_zones(powercap)
        self._wall_s = self._clock.monotonic_s()
        self._cpu_s = self._clock.cpu_s()
        self._energy_uj = {zone: _read_int(zone / "energy_uj") for zone in self._zones}

    def read(self) -> Metered:
        """Return what was spent since the meter was made; may be called again."""
        cpu_s = self._clock.cpu_s() - self._cpu_s
        measured = self._measured_j()
        return Metered(
            wall_s=self._clock.monotonic_s() - self._wall_s,
            cpu_s=cpu_s,
            energy_j=cpu_s * self._core.busy_power_w if measured is None else measured,
            energy_source="estimated" if measured is None else "measured",
            cost_usd=self._core.cost_usd(cpu_s),
        )

    def _measured_j(self) -> float | None:
        """Joules by the package counters, which wrap; None where there are none. The whole package counts, neighbours included."""
        total_uj = 0
        for zone in self._zones:
            before, now = self._energy_uj[zone], _read_int(zone / "energy_uj")
            if before is None or now is None:
                return None
            wrap = _read_int(zone / "max_energy_range_uj") or 0
            total_uj += now - before if now >= before else now - before + wrap
        return total_uj / 1e6 if self._zones else None


@contextmanager
def metered(prices: Mapping[str, Device], into: list[Metered]) -> Iterator[Meter]:
    """Meter the block and append the reading to `into`, also when the block raises."""
    meter = Meter(prices)
    try:
        yield meter
    finally:
        into.append(meter.read())


def _energy_zones(powercap: Path) -> list[Path]:
    zones = sorted(powercap.glob("intel-rapl:[0-9]")) if powercap.is_dir() else []
    return [zone for zone in zones if _read_int(zone / "energy_uj") is not None]


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
