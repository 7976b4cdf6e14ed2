"""The dated catalogue of prices and power (prices.toml) and what overrides it."""

import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated

from msgspec import Meta

from modelyard.errors import ConfigError
from modelyard.schema import Frozen, convert


class Device(Frozen, frozen=True):
    """One thing that can be rented and draws power."""

    id: str
    description: str
    price_usd_per_hour: Annotated[float, Meta(ge=0)]
    price_source: str
    price_as_of: str
    busy_power_w: Annotated[float, Meta(ge=0)]
    idle_power_w: Annotated[float, Meta(ge=0)]
    power_source: str
    power_as_of: str

    def cost_usd(self, seconds: float) -> float:
        return seconds / 3600 * self.price_usd_per_hour


class _Catalogue(Frozen, frozen=True):
    device: tuple[Device, ...]


def load_prices(override: Path | None = None) -> Mapping[str, Device]:
    """Return the devices by id: the shipped ones, replaced by those of `override` where ids agree.

    Raises:
        ConfigError: the file is not TOML or breaks the schema.
    """
    shipped = resources.files("modelyard").joinpath("prices.toml").read_text(encoding="utf-8")
    devices = {device.id: device for device in _parse(shipped, "prices.toml").device}
    if override is not None:
        try:
            text = override.read_text(encoding="utf-8")
        except OSError as exc:
            raise ConfigError(f"{override}: cannot be read ({exc.strerror}); give a readable price file") from exc
        devices |= {device.id: device for device in _parse(text, str(override)).device}
    return devices


def _parse(text: str, source: str) -> _Catalogue:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{source}: not valid TOML: {exc}; correct the line it names") from exc
    return convert(data, _Catalogue, source=source, error=ConfigError)
