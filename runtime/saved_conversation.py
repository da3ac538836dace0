"""What a session file holds of a conversation: messages, tools, options, and the KV rows of what was said.

Rows are worth something for the same model, layout and type of rows only, and so a file names the digests of the
artifact that it is of. The drafter has no rows of its own, and its hidden state comes with the first forward of the
next turn; but it sees one row more than the window, and so that is kept.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import MemoryBudgetError, SessionError
from runtime.kv_cache import KVSnapshot, Window
from runtime.kv_rows import Rows
from runtime.messages import plain_messages
from runtime.options import GenerationOptions, OptionArguments
from runtime.prefix import Parked
from runtime.session_file import read_session, write_session
from runtime.tools import Tool, tools_of


@dataclass(frozen=True, slots=True)
class SavedConversation:
    """A conversation as a file has it."""

    messages: list[dict[str, Any]]
    tools: tuple[Tool, ...]
    thinking: bool
    options: OptionArguments
    rows: Parked


def write_conversation(path: Path, identity: Mapping[str, Any], saved: SavedConversation) -> None:
    """Writes a session file; raises SessionError where that cannot be."""
    snapshot = saved.rows.snapshot
    header = {
        "identity": dict(identity),
        "messages": saved.messages,
        "tools": [tool.schema for tool in saved.tools],
        "thinking": saved.thinking,
        "options": dict(saved.options),
        "windows": [[window.first, window.stop] for window in snapshot.windows],
    }
    arrays: dict[str, Rows] = {"token_ids": np.array(saved.rows.token_ids, "<i4").view(np.uint8)}
    arrays |= {f"full.{name}": rows for name, rows in snapshot.full.items()}
    for place, window in enumerate(snapshot.windows):
        arrays |= {f"window{place}.{name}": rows for name, rows in window.rows.items()}
    write_session(path, header, arrays)


def read_conversation(path: Path, identity: Mapping[str, Any], empty: KVSnapshot, most_bytes: int) -> SavedConversation:
    """Reads a session file.

    Args:
        identity: of the artifact that it must be of
        empty: a snapshot of no tokens, whose arrays say what rows must be like
        most_bytes: that the file may take in memory

    Raises:
        SessionError: the file is damaged, or of another model, layout or type of rows.
        MemoryBudgetError: it is too large for the memory budget.
    """
    if path.is_file() and (num_bytes := path.stat().st_size) > most_bytes:
        raise MemoryBudgetError(
            f"{path}: the session has {num_bytes / 2**20:,.0f} MiB, the memory budget leaves {most_bytes / 2**20:,.0f} "
            "MiB to read it; load with a larger budget"
        )
    file = read_session(path)
    header = file.header
    _check_identity(path, header.get("identity"), identity)
    try:
        token_ids = file.arrays["token_ids"].view("<i4").tolist()
        rows = _rows(file.arrays, header["windows"], len(token_ids), empty)
        GenerationOptions(**header["options"]).check()
        return SavedConversation(
            messages=plain_messages(header["messages"]) if header["messages"] != [] else [],
            tools=tools_of(header["tools"]),
            thinking=header["thinking"] is True,
            options=header["options"],
            rows=Parked(token_ids, rows),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise SessionError(f"{path}: not a conversation of this version: {error}; start a new one") from error


def _check_identity(path: Path, found: Any, expected: Mapping[str, Any]) -> None:
    found = found if isinstance(found, Mapping) else {}
    for field in ("layout", "kv_dtype"):
        if found.get(field) != expected[field]:
            raise SessionError(
                f"{path}: its KV rows have {field} {found.get(field)!r:.20}, this runtime's {expected[field]!r}; load "
                "the artifact as it was when the session was saved, or start a new conversation"
            )
    files = found.get("files")
    files = files if isinstance(files, Mapping) else {}
    for name, digest in expected["files"].items():
        if files.get(name) != digest:
            raise SessionError(
                f"{path}: saved with another {name}; load the artifact that it was saved with, or start a new "
                "conversation"
            )


def _rows(
    arrays: Mapping[str, Rows], windows: Sequence[Sequence[int]], num_tokens: int, empty: KVSnapshot
) -> KVSnapshot:
    """Rows of the shapes that this runtime's cache has."""
    full = {name: _shaped(arrays, f"full.{name}", num_tokens, rows) for name, rows in empty.full.items()}
    kept = []
    for place, (first, stop) in enumerate(windows):
        if not 0 <= first <= stop <= num_tokens:
            raise ValueError(f"window {place} is [{first}, {stop}) of {num_tokens} tokens")
        shapes = empty.windows[-1].rows
        kept.append(
            Window(
                first,
                stop,
                {name: _shaped(arrays, f"window{place}.{name}", stop - first, rows) for name, rows in shapes.items()},
            )
        )
    if not kept:
        raise ValueError("it holds no window")
    return KVSnapshot(num_tokens, full, tuple(kept))


def _shaped(arrays: Mapping[str, Rows], name: str, num_rows: int, like: Rows) -> Rows:
    rows = arrays[name]
    if rows.shape != (num_rows, like.shape[1]):
        raise ValueError(f"{name} is {rows.shape}, expected ({num_rows}, {like.shape[1]})")
    return rows
