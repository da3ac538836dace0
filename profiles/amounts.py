"""Amounts of memory as people write them: "6 GiB", "800 MB", "4096"."""

import re
import reprlib
from decimal import Decimal

from profiles.errors import ProfileError, shown

MAX_BYTES = 2**63 - 1
_UNITS = {"": 1, "b": 1} | {
    f"{prefix}{suffix}": base**power
    for power, prefix in enumerate("kmgt", start=1)
    for suffix, base in (("ib", 1024), ("b", 1000))
}
_AMOUNT = re.compile(r"((?:[0-9]{1,19}|[0-9]{1,3}(?:,[0-9]{3}){1,6})(?:\.[0-9]{1,9})?) ?([A-Za-z]{0,3})")


def parse_bytes(text: str) -> int:
    """Bytes of "1.5 GiB", "2,560 MiB", "800 MB" or "4096"; KiB to TiB count in 1024, kB to TB in 1000.

    Raises:
        ProfileError: anything else.
    """
    match = _AMOUNT.fullmatch(text.strip())
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ProfileError(f"{reprlib.repr(text)} is no amount of memory; write it like '6 GiB', '512 MiB' or '4096'")
    return int(Decimal(match[1].replace(",", "")) * unit)


def amount_bytes(value: object, key: str) -> int:
    """Bytes of an amount that is given as an integer or as `parse_bytes` reads it.

    Raises:
        ProfileError: it is neither, or not above 0; the line names the key.
    """
    try:
        amount = parse_bytes(value) if isinstance(value, str) else value
    except ProfileError as error:
        raise ProfileError(f"{key}: {error}") from error
    if type(amount) is not int or not 0 < amount <= MAX_BYTES:
        raise ProfileError(f"{key} is {shown(value)}, expected bytes above 0 or an amount like '6 GiB'")
    return amount
