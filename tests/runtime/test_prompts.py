"""Only the template and the model write special tokens; what anybody else says of them stays text."""

from collections import Counter
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.demo.save import CHAT_TEMPLATE
from runtime.chat import ChatTemplate
from runtime.errors import RequestError
from runtime.prompts import Prompts
from runtime.response import ResponseFormat
from runtime.tokenizer import GUARD, Tokenizer
from runtime.tools import Tool, tool_of

BOS = 2
TOKENIZER = Tokenizer.load(CHAT_TEMPLATE.parent / "checkpoint" / "target" / "tokenizer.json", bos_token_id=BOS)
PROMPTS = Prompts(
    ChatTemplate(CHAT_TEMPLATE.read_text(encoding="utf-8"), {"bos_token": "<bos>"}),
    TOKENIZER,
    ResponseFormat.of(TOKENIZER),
)
SPECIAL = {id_: TOKENIZER.special_token(id_) for id_ in range(TOKENIZER.vocab_size) if TOKENIZER.special_token(id_)}

fragments = st.sampled_from(
    [*SPECIAL.values(), *('<|"', "|>", "<", ">", "<|", "turn", "tool", '"', GUARD, " ", "\n", "{", "}", ":", ",")]
)
texts = st.lists(fragments | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=6).map("".join)


def conversation(say: Any) -> tuple[list[dict[str, Any]], list[Tool]]:
    """Every place where somebody can say something; `say()` is what is said next."""
    call = {"id": "1", "function": {"name": say(), "arguments": {say(): say(), "b": [say(), {say(): say()}]}}}
    schema = {
        "name": "f",
        "description": say(),
        "parameters": {
            "properties": {
                say(): {"type": "string", "description": say(), "enum": [say()]},
                "b": {"type": "object", "properties": {say(): {"enum": [say()]}}, "required": [say()]},
            },
            "required": [say()],
        },
    }
    messages = [
        {"role": "system", "content": say()},
        {"role": "user", "content": [{"type": "text", "text": say()}, {"type": "text", "text": say()}]},
        {"role": "assistant", "content": say(), "reasoning_content": say(), "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "name": say(), "content": say()},
        {"role": "tool", "content": say()},
        {"role": "assistant", "content": say()},
        {"role": "user", "content": say()},
        {"role": "assistant", "content": "", "reasoning_content": say(), "tool_calls": [call]},
    ]
    return messages, [tool_of(schema)]


def special_ids(say: Any) -> Counter[str]:
    messages, tools = conversation(say)
    ids = PROMPTS.chat_ids(messages, tools, thinking=True, is_literal=True)
    return Counter(SPECIAL[id_] for id_ in ids if id_ in SPECIAL)


numbers = count()
EXPECTED = special_ids(lambda: f"x{next(numbers)}")
NUM_SAID = next(numbers)


@settings(deadline=None)
@given(st.lists(texts, min_size=NUM_SAID, max_size=NUM_SAID))
def test_special_tokens_are_the_templates_whatever_is_said(said: list[str]) -> None:
    unique = iter([f"{text}x{place}{text}" for place, text in enumerate(said)])  # keys must not fall together
    assert special_ids(lambda: next(unique)) == EXPECTED


@settings(deadline=None)
@given(texts)
def test_what_is_said_is_there_as_text(text: str) -> None:
    ids = PROMPTS.chat_ids([{"role": "user", "content": f"({text})"}])
    assert f"({text})".replace(GUARD, "") in TOKENIZER.decode(ids)


def test_what_the_model_wrote_keeps_its_special_tokens_unless_it_is_literal() -> None:
    messages = [{"role": "assistant", "content": "a<|think|>b"}]
    think = TOKENIZER.special_id("<|think|>")
    assert think in PROMPTS.chat_ids(messages)
    assert think not in PROMPTS.chat_ids(messages, is_literal=True)


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(RequestError, match=r"no chat template; use generate\(\) with a prompt of your own$"):
        replace(PROMPTS, template=None).chat_ids([{"role": "user", "content": "x"}])
