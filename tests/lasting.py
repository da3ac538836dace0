"""A runtime that outlives many faults: how it is opened and asked, and what it must still say afterwards."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edge import Generation, Runtime
from profiles import DeviceProfile
from tests.models import ONE_THREAD

CONTEXT = 120
PROMPT = [2, 45, 260, 7]
NUM_TOKENS = 40
PROFILE = replace(ONE_THREAD, context_tokens=CONTEXT, prefill_chunk_tokens=16)

Load = Callable[..., Runtime]


def open_runtime(folder: Path, profile: DeviceProfile = PROFILE) -> Runtime:
    """Knows no end of sequence: a generation is as long as it is asked to be."""
    runtime = Runtime.load(folder, profile=profile)
    runtime.manifest.generation["eos_token_ids"] = []
    return runtime


def forget(runtime: Runtime) -> None:
    """Makes the next generation begin as a fresh runtime's would."""
    target = runtime._loaded.target  # type: ignore[union-attr]
    target.clear()
    target.parked.entries.clear()


def greedy(runtime: Runtime, prompt: Sequence[int] = PROMPT, **options: Any) -> Generation:
    return runtime.generate(prompt, **({"max_tokens": NUM_TOKENS, "temperature": 0.0} | options))


def hooked(owner: object, name: str, number: int, hook: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls `hook` before the call of this number of a method."""
    method, calls = getattr(owner, name), []

    def call(*args: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == number:
            hook()
        return method(*args, **options)

    monkeypatch.setattr(owner, name, call)
