"""What cannot be used, said in one line: the error of this package, and how values and names are shown in it."""

import difflib
import reprlib
from collections.abc import Iterable


class ProfileError(ValueError):
    """A profile, or an option that stands in for one of its values, cannot be used."""


class _OneShortLine(reprlib.Repr):
    def repr_int(self, x: int, level: int) -> str:
        # Python does not write out integers of thousands of digits, but reads them where they are hexadecimal
        return f"an integer of {x.bit_length():,} bits" if x.bit_length() > 128 else repr(x)


_SHORT = _OneShortLine()
_SHORT.maxstring = _SHORT.maxother = 80


def shown(value: object) -> str:
    """A value as Python writes it, in one short line whatever it is."""
    return _SHORT.repr(value)


def nearest(name: str, names: Iterable[str]) -> str:
    """ ", did you mean ...?" with the name that was probably meant, or nothing."""
    matches = difflib.get_close_matches(name, list(names), n=1)
    return f", did you mean {matches[0]!r}?" if matches else ""
