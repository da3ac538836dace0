"""Stop strings in streamed text. Knows no tokens: it sees pieces of text of any length."""

import reprlib
from collections.abc import Sequence

from runtime.errors import RequestError


class StopScanner:
    """Passes text on until a stop string is complete, and holds back what may become one.

    The first stop string to be complete wins, of several that end at one character the longest: how the text is
    cut into pieces never matters.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Raises RequestError where `stops` is not a list of non-empty strings."""
        if isinstance(stops, str) or not isinstance(stops, Sequence):
            raise RequestError(f"stop must be a list of strings, got {reprlib.repr(stops)}; write [...] around one")
        for position, stop in enumerate(stops):
            if not isinstance(stop, str) or not stop:
                raise RequestError(f"stop {position} must be a non-empty string, got {reprlib.repr(stop)}")
        self._stops = tuple(stops)
        self._held = ""
        self._stopped = False

    def push(self, piece: str) -> tuple[str, bool]:
        """The text that is now safe to emit, and whether a stop string has been met."""
        if self._stopped:
            return "", True
        text = self._held + piece
        starts = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        self._stopped = bool(starts)
        cut = min(starts)[1] if starts else len(text) - self._num_held(text)
        self._held = "" if starts else text[cut:]
        return text[:cut], self._stopped

    def finish(self) -> str:
        """What was held back, once no more text comes."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        """Length of the longest suffix that begins a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        sizes = range(min(longest, len(text)), 0, -1)
        return next((size for size in sizes if any(stop.startswith(text[-size:]) for stop in self._stops)), 0)
