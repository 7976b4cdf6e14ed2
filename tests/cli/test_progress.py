"""What long work prints where there is no terminal."""

import re

import pytest

from modelyard.cli.progress import Progress, duration


def test_each_step_is_announced_and_closed_with_its_last_word(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.step("read")
        progress.detail("3 rows")
        progress.step("write")

    lines = capsys.readouterr().err.splitlines()
    assert lines[0].strip() == "read …"
    assert re.fullmatch(r"✓ read: 3 rows \(\d\.\d s\)", lines[1])
    assert re.fullmatch(r"✓ write \(\d\.\d s\)", lines[-1])


def test_a_step_that_fails_is_not_called_done(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with Progress() as progress:
            progress.step("read")
            raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        fail()

    assert "✓" not in capsys.readouterr().err


def test_results_stay_alone_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress() as progress:
        progress.step("read")
        progress.note("a warning")

    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.04, "0.0 s"), (9.96, "10.0 s"), (12.4, "12 s"), (65, "1 min 05 s"), (3700, "1 h 01 min")]
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text
