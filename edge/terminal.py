"""A chat's terminal: messages of one line or several come in, pieces go out with thoughts dimmed. Knows no commands."""

import os
import sys
import unicodedata
from dataclasses import dataclass
from typing import TextIO

from runtime.response import Piece, PieceKind

DIM, PLAIN = "\x1b[2m", "\x1b[0m"
QUOTES = '"""'


@dataclass(frozen=True, slots=True)
class Entry:
    """What was entered: a message, or where it begins with a slash and not with quotes, a command."""

    text: str
    is_command: bool


class Terminal:
    """Standard input and output. Without a terminal there are no prompts, and marks instead of dimmed text."""

    def __init__(self) -> None:
        self._is_shown = _is_terminal(sys.stdout)
        self.is_interactive = _is_terminal(sys.stdin) and self._is_shown
        self._is_dimming = self._is_shown and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._kind: PieceKind = "text"
        self._is_line_open = False
        if self.is_interactive:
            _edit_lines()

    def read(self) -> Entry | None:
        r"""The next entry, whose lines go on behind a backslash or up to closing quotes; None at the end of input."""
        line = self._line("> ")
        if line is None:
            return None
        if line.startswith(QUOTES):
            return Entry(self._quoted(line.removeprefix(QUOTES)), is_command=False)
        while line.endswith("\\"):
            more = self._line(". ")
            line = f"{line[:-1]}\n{more or ''}"
        return Entry(line, is_command=line.startswith("/"))

    def piece(self, piece: Piece) -> None:
        """Shows a piece of an answer."""
        self._turn_to(piece.kind)
        self._write(_without_controls(piece) if self._is_shown else piece)

    def end_answer(self) -> None:
        """Ends the answer's line."""
        self._turn_to("text")
        if self._is_line_open:
            self._write("\n")

    def note(self, text: str) -> None:
        """Shows lines that are not the model's."""
        self._write(f"{DIM}{text}{PLAIN}\n" if self._is_dimming else f"{text}\n")

    def _line(self, prompt: str) -> str | None:
        if not self.is_interactive:
            line = sys.stdin.readline() if sys.stdin is not None else ""  # None where it was closed
            return line.removesuffix("\n") if line else None
        try:
            return input(prompt)
        except EOFError:
            return None

    def _quoted(self, line: str) -> str:
        lines: list[str] = []
        more: str | None = line
        while more is not None and not more.rstrip().endswith(QUOTES):
            lines.append(more)
            more = self._line(". ")
        return "\n".join([*lines, *([] if more is None else [more.rstrip().removesuffix(QUOTES)])])

    def _turn_to(self, kind: PieceKind) -> None:
        if kind == self._kind:
            return
        self._kind = kind
        if kind == "thinking":
            self._write(DIM if self._is_dimming else "<thinking>\n")
            return
        self._write(PLAIN if self._is_dimming else "")
        self._write("\n" if self._is_line_open else "")
        self._write("" if self._is_dimming else "</thinking>\n")

    def _write(self, text: str) -> None:
        print(text, end="", flush=True)
        if text not in ("", DIM, PLAIN):
            self._is_line_open = not text.endswith("\n")


def _is_terminal(stream: TextIO | None) -> bool:
    return stream is not None and stream.isatty()


def _edit_lines() -> None:
    """Makes `input` edit lines and remember them, in memory alone."""
    try:
        import readline  # noqa: F401 - its import is what does it; some systems have none
    except ImportError:
        return


def _without_controls(text: str) -> str:
    """Text that cannot steer a terminal."""
    return "".join(char for char in text if char in "\n\t" or unicodedata.category(char) != "Cc")
