"""What a stranger's text may do to a terminal: nothing."""

from hypothesis import given
from hypothesis import strategies as st

from modelyard.cli.terminal import printable


@given(st.text())
def test_what_is_printed_moves_no_cursor_and_ends_no_line(text: str) -> None:
    shown = printable(text)
    assert shown.replace("\u00a0", " ").isprintable() or all(char.isprintable() or char.isspace() for char in shown)
    assert not {"\n", "\r", "\x1b", "\x9b", "\u2028", "\u202e"} & set(shown)


@given(st.text(st.characters(categories=["L", "N", "P", "S", "Zs"])))
def test_ordinary_text_stays_as_it_is(text: str) -> None:
    assert printable(text) == text


def test_an_escape_is_shown_as_python_writes_it() -> None:
    assert printable("a\x1b[2K\nb\u202ec") == r"a\x1b[2K\nb\u202ec"
    assert printable("a\n\tb\x1b", keep="\n\t") == "a\n\tb\\x1b"
