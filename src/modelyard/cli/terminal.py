"""Text from elsewhere, made fit for a terminal: a bundle from a stranger must not move the cursor or forge lines."""

import unicodedata


def printable(text: str, *, keep: str = "") -> str:
    """Return `text` with every control, format or unassigned character escaped as in Python, those in `keep` excepted.

    >>> printable("late\\x1b[2K")
    'late\\\\x1b[2K'
    """
    if text.isprintable():
        return text
    return "".join(char if char in keep or _is_plain(char) else _escaped(char) for char in text)


def _is_plain(char: str) -> bool:
    return char.isprintable() or unicodedata.category(char) == "Zs"  # such as the no-break space


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")
