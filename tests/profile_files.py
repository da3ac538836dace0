"""A user's profile as a TOML file, with values to change, and what a refusal of one looks like."""

from pathlib import Path

import pytest

from profiles import ProfileError, load_profile

LINES = {
    "description": '"mine"',
    "memory_budget": '"6 GiB"',
    "providers": '["CPUExecutionProvider"]',
    "num_threads": "0",
    "kv_dtype": '"auto"',
    "context_tokens": "8192",
    "prefill_chunk_tokens": "512",
    "num_draft_tokens": "3",
    "model": '"E2B"',
    "weight_bits": "4",
}


def write(folder: Path, **changes: str | None) -> Path:
    """A profile whose keys are changed, added or (None) left out."""
    lines = {key: value for key, value in (LINES | changes).items() if value is not None}
    path = folder / "mine.toml"
    path.write_text("".join(f"{key} = {value}\n" for key, value in lines.items()), encoding="utf-8")
    return path


def refuses(path: Path | str, match: str) -> None:
    with pytest.raises(ProfileError, match=match) as caught:
        load_profile(path)
    assert "\n" not in str(caught.value)
