"""The one exception that a user is meant to read, and how much of a bad value it shows."""

import reprlib


class InputError(ValueError):
    """Bad input found before (or instead of) long work: the command line prints the message and leaves with code 2.

    The message is one clear sentence or two: what is wrong, where (file, case, key), which rule it breaks, what to do.
    """


def brief(value: object) -> str:
    """`repr` for messages: of long text, lists and nested values only the beginning; always printable."""
    return _BRIEF.repr(value)


_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = 300
_BRIEF.maxlong = 40
