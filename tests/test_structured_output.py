"""Structured output: every document is valid, and drafts change nothing of it."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from edge import InferenceError, MemoryBudgetError, RequestError, Runtime
from runtime.constraints import Constraints
from runtime.grammar import choice, json_object, json_schema, lark, regex
from tests.json_schemas import random_schemas
from tests.lasting import PROFILE

MESSAGES = [{"role": "user", "content": "Write JSON."}]
NUM_SCHEMAS = 200


@pytest.fixture(scope="module")
def runtime(demo_artifact: Callable[..., Path]) -> Iterator[Runtime]:
    profile = replace(PROFILE, context_tokens=1000, prefill_chunk_tokens=48)
    with Runtime.load(demo_artifact(4, "native"), profile=profile) as loaded:
        yield loaded


def test_documents_of_random_schemas_are_valid_and_drafts_change_nothing(runtime: Runtime) -> None:
    num_closed = num_drafted = num_accepted = 0
    for seed, schema in enumerate(random_schemas(NUM_SCHEMAS, seed=7)):
        options: dict[str, Any] = {"grammar": json_schema(schema), "max_tokens": 64, "temperature": 0}
        plain = runtime.chat(MESSAGES, **options, num_draft_tokens=0)
        drafted = runtime.chat(MESSAGES, **options, num_draft_tokens=3)
        sampled = drafted
        if seed % 4 == 0:
            sampled = runtime.chat(MESSAGES, **options | {"temperature": 1.0}, num_draft_tokens=3, seed=seed)
        assert (drafted.token_ids, drafted.finish_reason) == (plain.token_ids, plain.finish_reason)
        for made in (plain, sampled):
            assert made.finish_reason in ("stop", "length")
            if made.finish_reason == "stop":
                jsonschema.validate(json.loads(made.text), schema)
                num_closed += 1
        num_drafted += drafted.stats.num_drafted
        num_accepted += drafted.stats.num_accepted
    assert num_closed > 1.2 * NUM_SCHEMAS  # the demo is no JSON writer: it may go on with one key after the other
    assert num_accepted > 0.1 * num_drafted


@pytest.mark.parametrize("num_drafts", [0, 2])
def test_other_grammars(runtime: Runtime, num_drafts: int) -> None:
    def made(grammar: Any, temperature: float = 1.0) -> str:
        answer = runtime.chat(
            MESSAGES, grammar=grammar, max_tokens=60, temperature=temperature, seed=3, num_draft_tokens=num_drafts
        )
        assert answer.finish_reason == "stop"
        return answer.text

    assert re.fullmatch("[a-c]{3}-[0-9]{2}", made(regex("[a-c]{3}-[0-9]{2}")))
    assert made(choice(["yes", "no", "perhaps"])) in ("yes", "no", "perhaps")
    assert made(lark('start: "<" WORD ">"\nWORD: /[a-z]{2,5}/')).startswith("<")


def test_any_object(runtime: Runtime) -> None:
    options: dict[str, Any] = {"grammar": json_object(), "max_tokens": 40, "num_draft_tokens": 2}
    answers = [runtime.chat(MESSAGES, **options, seed=seed) for seed in range(20)]
    assert all(answer.text.startswith("{") for answer in answers)
    whole = [answer.text for answer in answers if answer.finish_reason == "stop"]
    assert whole
    assert all(isinstance(json.loads(text), dict) for text in whole)


def test_a_document_that_is_complete_at_the_limit_says_stop(runtime: Runtime) -> None:
    for limit in (1, 50):
        made = runtime.generate([2, 5, 9], grammar=choice(["x"]), temperature=0, max_tokens=limit)
        assert (made.text, made.finish_reason) == ("x", "stop")


def test_a_document_that_is_cut_short_says_length(runtime: Runtime) -> None:
    made = runtime.chat(MESSAGES, grammar=regex("[a-z]{40}"), temperature=0, max_tokens=3)
    assert made.finish_reason == "length"


def test_sampling_in_a_grammar_is_the_masked_distribution(runtime: Runtime) -> None:
    """With drafts and without: what was drafted but is not allowed must not change what is drawn in its place."""
    grammar = choice([f"{a}{b}" for a in "abcd" for b in "efgh"])

    def counts(num_drafts: int) -> dict[str, int]:
        found: dict[str, int] = {}
        for seed in range(500):
            made = runtime.generate(
                [2, 5, 9], grammar=grammar, temperature=2.0, top_k=0, top_p=1.0, seed=seed, num_draft_tokens=num_drafts
            )
            found[made.text] = found.get(made.text, 0) + 1
        return found

    plain, drafted = counts(0), counts(2)
    for text in plain.keys() | drafted.keys():
        one, other = plain.get(text, 0), drafted.get(text, 0)
        # the difference of two binomial counts; 5 standard deviations
        assert abs(one - other) <= 5 * (one + other + 1) ** 0.5, text


def test_thoughts_stand_before_a_document(runtime: Runtime) -> None:
    form = runtime.prompts.response_format
    grammar = choice(["yes", "no"])
    made = runtime.chat(MESSAGES, grammar=grammar, thinking=True, thinking_budget=4, temperature=0, max_tokens=30)
    assert made.text in ("yes", "no")
    forced = runtime.chat(MESSAGES, grammar=grammar, temperature=0, max_tokens=30)
    assert form.thought_start not in forced.token_ids


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (lambda: "{}", "grammar is '{}', expected one of json_schema, regex, choice or lark"),
        (lambda: regex("(?=x)y"), "look-around"),
        (lambda: json_schema({"type": "object", "properties": {"a": {"$ref": "http://x.y/z"}}}), "http://x.y/z"),
    ],
)
def test_grammars_that_are_none(runtime: Runtime, grammar: Callable[[], Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        runtime.chat(MESSAGES, grammar=grammar())


def test_a_budget_without_room_for_the_compiler(demo_artifact: Callable[..., Path]) -> None:
    folder = demo_artifact(4, "native")
    with Runtime.load(folder, profile=PROFILE) as runtime:
        least = runtime.plan.peak_bytes
    with Runtime.load(folder, profile=PROFILE, memory_budget=least + 1000) as runtime:
        with pytest.raises(MemoryBudgetError, match=r"structured output needs 2 MiB beside the plan, .* leaves 0 MiB"):
            runtime.chat(MESSAGES, grammar=choice(["x"]))
        assert runtime.chat(MESSAGES, max_tokens=3).text


class ForbidsAll:
    """A constraint that nothing satisfies."""

    is_complete = False

    def num_allowed(self, token_ids: Sequence[int]) -> int:
        return 0

    def masks(self, token_ids: Sequence[int]) -> list[Any]:
        return [np.zeros(2048, np.bool_) for _ in range(len(token_ids) + 1)]

    def consume(self, token_ids: Sequence[int]) -> None:
        raise AssertionError("nothing is generated")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_constraint_that_forbids_every_token(  # 66
    runtime: Runtime, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Constraints, "of", lambda *arguments, **options: ForbidsAll())
    with pytest.raises(InferenceError, match=r"step 0: the largest .* is -inf; .* every token is masked"):
        runtime.chat(MESSAGES, temperature=temperature)
    monkeypatch.undo()
    assert runtime.chat(MESSAGES, temperature=0, max_tokens=3).text
