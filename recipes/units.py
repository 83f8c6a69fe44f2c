"""Values as people write them in a recipe: 2M tokens, 64k, 1.5B, one name for a list of one."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

FACTORS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "Ki": 2**10, "Mi": 2**20}
COUNT_WORDS = "a count such as 16384, 64k, 2M or 1Mi (k, M, B are decimal; Ki, Mi binary)"
_COUNT = re.compile(r"(\d[\d_]*(?:\.\d+)?)\s*([A-Za-z]*)")


def parse_count(value: Any) -> int:
    """A whole number from an int, a float without a fraction, or text with a suffix.

    Raises:
        ValueError: anything else; says what was expected and found.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str):
        match = _COUNT.fullmatch(value.strip())
        if match and match[2] in FACTORS:
            number = Decimal(match[1].replace("_", "")) * FACTORS[match[2]]
            if number == number.to_integral_value():
                return int(number)
    raise ValueError(f"expected {COUNT_WORDS}, found {value!r}")


def listed(value: Any) -> Any:
    """A single name as a list of it; anything else as it is."""
    return [value] if isinstance(value, str) else value


def format_count(number: float) -> str:
    """A count for people: 1500000 -> 1.5M, with at most three significant digits."""
    for suffix in ("B", "M", "k"):
        if abs(number) >= FACTORS[suffix]:
            return f"{float(f'{number / FACTORS[suffix]:.3g}'):g}{suffix}"
    return f"{number:g}"


def format_bytes(number: float) -> str:
    """Bytes for people, in binary units: 3.2 MiB."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if number >= 1024**power:
            return (
                f"{number / 1024**power:.3g} {unit}"
                if number < 1000 * 1024**power
                else f"{number / 1024**power:.0f} {unit}"
            )
    return f"{number:.0f} B"
