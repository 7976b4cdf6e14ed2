"""What a piece of work took: wall and CPU seconds, joules, money.

Energy is read from the processor's own counters (Linux powercap) where they can be read, and is otherwise an estimate from
CPU seconds that says so.
"""

from collections.abc import Mapping
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
    """Meters from its construction on. Not thread-safe; one owner.

    Money is CPU seconds at the price of one core: what the work would cost when rented by the core. With `gpu`, a GPU is paid
    beside them for every second, used or not.
    """

    def __init__(
        self,
        prices: Mapping[str, Device],
        clock: Clock | None = None,
        powercap: Path = POWERCAP,
        *,
        gpu: bool = False,
    ) -> None:
        self._core = prices["cpu-core"]
        self._gpu = prices["gpu"] if gpu else None
        self._clock = clock or SystemClock()
        self._zones = _energy_zones(powercap)
        self._wall_s = self._clock.monotonic_s()
        self._cpu_s = self._clock.cpu_s()
        self._energy_uj = {zone: _read_int(zone / "energy_uj") for zone in self._zones}

    def read(self) -> Metered:
        """Return what was spent since the meter was made; may be called again."""
        cpu_s = self._clock.cpu_s() - self._cpu_s
        wall_s = self._clock.monotonic_s() - self._wall_s
        measured = self._measured_j()
        spent = Metered(
            wall_s=wall_s,
            cpu_s=cpu_s,
            energy_j=cpu_s * self._core.busy_power_w if measured is None else measured,
            energy_source="estimated" if measured is None else "measured",
            cost_usd=self._core.cost_usd(cpu_s),
        )
        return spent if self._gpu is None else spent + _rented(self._gpu, wall_s)

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


def _rented(device: Device, seconds: float) -> Metered:
    """A device that is paid, and assumed busy, for as long as it is held."""
    return Metered(
        wall_s=0.0,
        cpu_s=0.0,
        energy_j=seconds * device.busy_power_w,
        energy_source="estimated",
        cost_usd=device.cost_usd(seconds),
    )


def _energy_zones(powercap: Path) -> list[Path]:
    zones = sorted(powercap.glob("intel-rapl:[0-9]")) if powercap.is_dir() else []
    return [zone for zone in zones if _read_int(zone / "energy_uj") is not None]


def _read_int(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
