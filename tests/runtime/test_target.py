"""A forward gives memory back where it used much, and only there: a decode step has no time for it."""

from collections.abc import Callable

import pytest

from runtime import target as module
from runtime.kv_cache import GROWTH_TOKENS
from runtime.target import RELEASING_TOKENS
from tests.models import TinyModels


def test_prompts_and_growth_give_memory_back(
    open_tiny: Callable[..., TinyModels], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = open_tiny("wide", max_tokens=2 * GROWTH_TOKENS).target
    released_at: list[int] = []
    monkeypatch.setattr(module, "release_free_memory", lambda: released_at.append(target.num_tokens))
    target.forward([5] * RELEASING_TOKENS, 1)
    while target.num_tokens <= GROWTH_TOKENS + 2:
        target.forward([5], 1)
    assert released_at == [RELEASING_TOKENS, GROWTH_TOKENS + 1]
