"""The catalogue ships with sources and dates, and a file of the user's replaces entries by id."""

from pathlib import Path

import pytest

from modelyard.errors import ConfigError
from modelyard.prices import load_prices

CORE = """
[[device]]
id = "cpu-core"
description = "ours"
price_usd_per_hour = 3.6
price_source = "our invoice"
price_as_of = "2026-01-01"
busy_power_w = 7.0
idle_power_w = 2.0
power_source = "our meter"
power_as_of = "2026-01-01"
"""


def _file(folder: Path, text: str) -> Path:
    path = folder / "ours.toml"
    path.write_text(text)
    return path


def test_every_shipped_figure_has_a_source_and_a_date() -> None:
    devices = load_prices()
    assert "cpu-core" in devices
    for name, device in devices.items():
        assert device.id == name
        assert device.price_source
        assert device.power_source
        assert device.price_as_of[:2] == device.power_as_of[:2] == "20"
        assert device.idle_power_w <= device.busy_power_w


def test_an_override_replaces_by_id_and_keeps_the_rest(tmp_path: Path) -> None:
    devices = load_prices(_file(tmp_path, CORE))
    assert devices["cpu-core"].cost_usd(seconds=1000) == pytest.approx(1.0)
    assert devices.keys() == load_prices().keys()
    added = load_prices(_file(tmp_path, CORE.replace("cpu-core", "abacus")))
    assert added.keys() == {*load_prices().keys(), "abacus"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (CORE + 'colour = "red"\n', r"ours\.toml: device\[0\]: .*unknown key 'colour'.*; correct this field"),
        (
            CORE.replace("3.6", "-3.6"),
            r"device\[0\]\.price_usd_per_hour: must be a number of at least 0.*, got -3\.6; correct this field",
        ),
        (CORE.replace('"ours"', "5"), r"device\[0\]\.description: must be text, got 5"),
        (CORE.replace("idle_power_w = 2.0", ""), r"device\[0\]: .*the key 'idle_power_w' is missing"),
        ("[[device]\n", r"ours\.toml: not valid TOML: .*; correct the line it names"),
        ("", r"the top level: the key 'device' is missing"),
    ],
)
def test_a_wrong_price_file_is_told_by_field_value_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_prices(_file(tmp_path, text))


def test_an_absent_price_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read \(No such file or directory\); give a readable"):
        load_prices(tmp_path / "none.toml")
