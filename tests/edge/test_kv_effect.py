"""The measure of narrower KV rows: nothing where nothing differs, a little and in the right order where they do."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from edge.bench.kv_effect import KVEffect, kl_divergence, kv_effects
from export.demo.prompts import load_prompts
from export.source import DEMO_FOLDER
from profiles import DeviceProfile, ProfileError
from runtime.errors import RequestError
from tests.layouts import needs_native

LENGTH, NUM_POSITIONS, MAX_TOKENS = 300, 37, 12
PROMPTS = [prompt.text for prompt in load_prompts()[:2]]


@pytest.fixture(scope="module")
def text() -> list[int]:
    """Of the demo's language: a random net, or one that is given noise, is unsure and makes much of any rounding."""
    tokenizer = Tokenizer.from_file(str(DEMO_FOLDER / "target" / "tokenizer.json"))
    token_ids: list[int] = tokenizer.encode("\n".join(prompt.text for prompt in load_prompts())).ids
    return token_ids[:LENGTH]


@pytest.fixture(scope="module")
def effects(demo_artifact: Callable[..., Path], one_thread: DeviceProfile, text: list[int]) -> dict[str, KVEffect]:
    made = kv_effects(
        demo_artifact(4, "native"),
        replace(one_thread, prefill_chunk_tokens=40),
        text,
        PROMPTS,
        kv_dtypes=("float32", "float16", "int8"),
        num_positions=NUM_POSITIONS,
        max_tokens=MAX_TOKENS,
    )
    return {effect.kv_dtype: effect for effect in made}


@needs_native
def test_the_same_type_changes_nothing(effects: dict[str, KVEffect]) -> None:
    effect = effects["float32"]
    assert (effect.mean_kl_nats, effect.max_kl_nats, effect.same_best_share) == (0.0, 0.0, 1.0)
    assert effect.acceptance_rate and effect.acceptance_rate == effect.float32_acceptance_rate
    assert effect.equal_tokens == effect.generated_tokens == (MAX_TOKENS, MAX_TOKENS)
    assert effect.num_equal_prompts == len(PROMPTS)


@needs_native
def test_narrower_rows_change_a_little_and_the_narrowest_most(effects: dict[str, KVEffect]) -> None:
    assert 0 < effects["float16"].mean_kl_nats < effects["int8"].mean_kl_nats
    for kv_dtype in ("float16", "int8"):
        effect = effects[kv_dtype]
        assert effect.mean_kl_nats < effect.max_kl_nats < 0.1  # of distributions of some nats
        assert 0.9 <= effect.same_best_share <= 1
        assert effect.acceptance_rate is not None and 0 < effect.acceptance_rate <= 1
        assert (effect.context_tokens, effect.num_positions) == (LENGTH, NUM_POSITIONS)


@needs_native
def test_an_effect_is_plain_json(effects: dict[str, KVEffect]) -> None:
    content = json.loads(json.dumps(effects["int8"].to_json()))
    assert content["kv_dtype"] == "int8"
    assert content["num_equal_prompts"] == effects["int8"].num_equal_prompts
    assert len(content["equal_tokens"]) == len(content["generated_tokens"]) == len(PROMPTS)


def test_kl_by_hand() -> None:
    expected, found = np.log([[0.5, 0.25, 0.25], [0.5, 0.25, 0.25]]), np.log([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
    nats = kl_divergence(expected.astype(np.float32) + 9, found.astype(np.float32) - 3)
    # logits near 10 in float32 are off by 2^-21
    np.testing.assert_allclose(nats, [0.25 * np.log(2), 0.0], atol=2e-6)


@needs_native
def test_more_positions_than_tokens_are_refused(
    demo_artifact: Callable[..., Path], one_thread: DeviceProfile, text: list[int]
) -> None:
    with pytest.raises(RequestError, match="301 positions are to be compared in a text of 300 tokens"):
        kv_effects(demo_artifact(4, "native"), one_thread, text, PROMPTS, num_positions=LENGTH + 1)


def test_a_portable_artifact_is_refused(tiny_artifact: Callable[..., Path], one_thread: DeviceProfile) -> None:
    with pytest.raises(ProfileError, match="kv_dtype 'float16' needs the native layout"):
        kv_effects(tiny_artifact("wide", 4), one_thread, [2, 5, 7], PROMPTS, num_positions=1)
