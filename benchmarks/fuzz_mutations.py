"""Ways to damage a file: bytes changed, cut, moved and put together, JSON with other values in other places."""

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

EDGES = (0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 0.5, -0.0, 1e-300, 1e308, float("inf"), float("-inf"), float("nan"),
    10**6, 10**12, 2**63, 10**30, 10**400, "", "0", "a", "background", "é", "\ud800", "\0", "x" * 5000,
    "../../etc/passwd", "/etc/passwd", "/dev/zero", "../x.nii.gz", "$HOME/x.nii.gz", "~/x.nii.gz",
    "%s%n", "0x999999999999", "1e9", "NaN", [], {}, [[]], [{}], {"": {}}, [None], [0] * 50, [[1, 2, 3]] * 3, {"0": "CT"}, {"a": 10**12},
)  # fmt: skip


def damaged(content: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """The bytes after one to four of the changes below."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        if not data:
            break
        rng.choice(BYTE_CHANGES)(data, rng.randrange(len(data)), others, rng)
    return bytes(data)


def flip_bit(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    data[at] ^= 1 << rng.randrange(8)


def set_byte(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    data[at] = rng.choice((0, 1, 127, 128, 255, rng.randrange(256)))


def set_number(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    length = rng.choice((2, 4, 8))
    value = rng.choice(EDGES) % 256**length
    data[at : at + length] = value.to_bytes(length, rng.choice(("little", "big")))


def cut_off(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    del data[at:]


def cut_out(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    del data[at : at + rng.choice((1, 4, 64, 1024))]


def repeat(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    data[at:at] = data[at : at + rng.choice((1, 8, 100))] * rng.choice((1, 2, 50))


def insert(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))


def splice(data: bytearray, at: int, others: list[bytes], rng: random.Random) -> None:
    other = rng.choice(others)
    start = rng.randrange(len(other) + 1)
    data[at : at + rng.choice((0, 16, 500))] = other[start : start + rng.choice((4, 64, 1024))]


BYTE_CHANGES = (flip_bit, flip_bit, set_byte, set_number, cut_off, cut_out, repeat, insert, splice)
HEAD_CHANGES = (flip_bit, set_byte, set_number, set_number)


def damaged_head(content: bytes, length: int, rng: random.Random) -> bytes:
    """The bytes after one to four changes among the first `length`, where formats say how much of what follows."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4))):
        rng.choice(HEAD_CHANGES)(data, rng.randrange(min(length, len(data))), [], rng)
    return bytes(data)


def damaged_json(content: bytes, rng: random.Random) -> bytes:
    """JSON with one to four of its values replaced, removed, renamed, moved or nested; sometimes damaged as text too."""
    value = json.loads(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        value = _changed(value, rng)
    text = json.dumps(value).encode()
    return damaged(text, [text], rng) if rng.random() < 0.15 else text


def _changed(value: Any, rng: random.Random) -> Any:
    spots = list(places(value))
    if not spots or rng.random() < 0.01:
        return rng.choice(ODD_VALUES)
    holder, key = rng.choice(spots)
    change = rng.randrange(8)
    if change < 4:
        holder[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif change == 4:
        del holder[key]
    elif change == 5:
        other, there = rng.choice(spots)
        holder[key] = copy.deepcopy(other[there])
    elif change == 6 and isinstance(holder, dict):
        holder[rng.choice(("", "0", "x", "background", "\ud800", "a" * 300, "../x", key + "_"))] = holder.pop(key)
    else:
        for _ in range(rng.choice((1, 3, 100))):
            holder[key] = [holder[key]]
    return value


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """(container, key) of every value within."""
    level = [value]
    while level:
        holder = level.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder) if isinstance(holder, list) else ()
        for key, inner in list(items)[:200]:
            yield holder, key
            level.append(inner)
