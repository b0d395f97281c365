"""Values of a plans.json, checked: a file must not make us reserve memory or loop without end.

The limits are what no real plan comes near. TypeError and ValueError say what is wrong; who reads the file says where.
"""

from pgps_jax.errors import brief

MOST_STAGES = 24
MOST_FEATURES = 2**16
MOST_BLOCKS = 1000  # convolutions or residual blocks of one stage
MOST_BATCH = 2**20
LONGEST_EDGE = 2**15  # voxels of a patch
SHORTEST_SPACING = 1e-6  # mm
Number = int | float


def text(value: object) -> str:
    """The value, if it is text."""
    if not isinstance(value, str):
        raise TypeError(f"{brief(value)} is no text")
    return value


def sequence(value: object) -> list | tuple:
    """The value, if it is a list."""
    if not isinstance(value, list | tuple):
        raise TypeError(f"{brief(value)} is no list")
    return value


def three(values: object, lead: Number, kind: type) -> tuple:
    """Three numbers of a kind; of two numbers, which are 2D, `lead` becomes the first."""
    numbers = tuple(kind(v) for v in sequence(values))
    if len(numbers) not in (2, 3):
        raise ValueError(f"{brief(values)}: want 2 or 3 numbers")
    return numbers if len(numbers) == 3 else (kind(lead), *numbers)


def within(name: str, number: Number, least: Number, most: Number) -> Number:
    """The number, if it is between two others."""
    if not least <= number <= most:  # also false for NaN
        raise ValueError(f"{name} {brief(number)}: want {least:g} to {most:g}")
    return number


def each(name: str, numbers: tuple, least: Number, most: Number) -> tuple:
    """The numbers, if each is between two others."""
    return tuple(within(name, number, least, most) for number in numbers)


def intensities(value: dict) -> dict[str, dict[str, float]]:
    """Statistics of each channel, as read."""
    for channel, statistics in value.items():
        for name, number in statistics.items():
            if not isinstance(number, int | float):
                raise TypeError(f"intensities of channel {brief(channel)}: {name} is {brief(number)}, no number")
    return value
