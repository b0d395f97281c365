"""The one exception that a user is meant to read."""


class InputError(ValueError):
    """Bad input found before (or instead of) long work: the command line prints the message and leaves with code 2.

    The message is one clear sentence or two: what is wrong, where (file, case, key), which rule it breaks, what to do.
    """
