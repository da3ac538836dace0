"""A forward gives memory back where it used much, and only there: a decode step has no time for it."""

from collections.abc import Callable

import pytest

from runtime import target as module
from runtime.target import RELEASING_TOKENS
from tests.models import TinyModels


def test_prompts_give_memory_back(open_tiny: Callable[..., TinyModels], monkeypatch: pytest.MonkeyPatch) -> None:
    target = open_tiny("wide").target
    released_at: list[int] = []
    monkeypatch.setattr(module, "release_free_memory", lambda: released_at.append(target.num_tokens))
    target.forward([5] * RELEASING_TOKENS, 1)
    for num_tokens in (1, RELEASING_TOKENS - 1, 4):
        target.forward([5] * num_tokens, 1)
    assert released_at == [RELEASING_TOKENS]
