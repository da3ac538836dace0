"""The demo's chat template writes turns, thoughts and tools as the released one does, here and in transformers."""

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from export.demo.save import CHAT_TEMPLATE
from runtime.chat import ChatTemplate
from runtime.errors import RequestError
from runtime.tool_calls import MAX_DEPTH, parse_tool_call

TOKENS = {"bos_token": "<bos>"}
SOURCE = CHAT_TEMPLATE.read_text(encoding="utf-8")
USER = {"role": "user", "content": " What is the weather in Rome?\n"}
SYSTEM = {"role": "system", "content": " Be terse. "}
SCHEMA = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Says the weather.",
        "parameters": {
            "type": "object",
            "properties": {
                "unit": {"type": "string", "enum": ["C", "F"], "nullable": True},
                "city": {"type": "string", "description": "Where"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "at": {"type": "object", "properties": {"lat": {"type": "number"}}, "required": ["lat"]},
            },
            "required": ["city"],
        },
    },
}
BARE = {
    "type": "function",
    "function": {"name": "now", "description": "", "parameters": {"type": "object", "properties": {}}},
}
DECLARED = (
    '<|tool>declaration:weather{description:<|"|>Says the weather.<|"|>,parameters:{properties:{'
    'at:{properties:{lat:{type:<|"|>NUMBER<|"|>}},required:[<|"|>lat<|"|>],type:<|"|>OBJECT<|"|>},'
    'city:{description:<|"|>Where<|"|>,type:<|"|>STRING<|"|>},'
    'days:{items:{type:<|"|>INTEGER<|"|>},type:<|"|>ARRAY<|"|>},'
    'unit:{enum:[<|"|>C<|"|>,<|"|>F<|"|>],nullable:true,type:<|"|>STRING<|"|>}'
    '},required:[<|"|>city<|"|>],type:<|"|>OBJECT<|"|>}}<tool|>'
)
ARGUMENTS = {"city": "Rome", "at": {"lat": 41.9, "b": None}, "days": [1, -2], "Sure": True, "no": False, "none": {}}
CALL_TEXT = (
    '<|tool_call>call:weather{at:{b:null,lat:41.9},city:<|"|>Rome<|"|>,days:[1,-2],no:false,none:{},Sure:true}'
    "<tool_call|>"
)
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
CALL_NOW = {"id": "2", "type": "function", "function": {"name": "now", "arguments": {}}}
CALLING = {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "I should look."}
RESULT = {"role": "tool", "tool_call_id": "1", "content": " Sunny. "}
STRAY = {"role": "tool", "content": "x"}
RESULT_TEXT = '<|tool_response>response:weather{value:<|"|> Sunny. <|"|>}<tool_response|>'
THOUGHT = "<|channel>thought\nI should look.\n<channel|>"
USER_TEXT = "<|turn>user\nWhat is the weather in Rome?<turn|>\n"


def answer(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


# messages, options, and the text behind <bos> with a generation prompt
ROUNDS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str]] = {
    "plain": (
        [USER, answer("Hi. "), USER],
        {},
        USER_TEXT + "<|turn>model\nHi.<turn|>\n" + USER_TEXT + "<|turn>model\n",
    ),
    "two-answers": (
        [USER, answer("a"), answer("b")],
        {},
        USER_TEXT + "<|turn>model\na<turn|>\n<|turn>model\nb<turn|>\n<|turn>model\n",
    ),
    "developer": (
        [{**SYSTEM, "role": "developer"}, USER],
        {},
        "<|turn>system\nBe terse.<turn|>\n" + USER_TEXT + "<|turn>model\n",
    ),
    "thinking": ([USER], {"thinking": True}, "<|turn>system\n<|think|>\n<turn|>\n" + USER_TEXT + "<|turn>model\n"),
    "thinking-system": (
        [SYSTEM, USER],
        {"thinking": True},
        "<|turn>system\n<|think|>\nBe terse.<turn|>\n" + USER_TEXT + "<|turn>model\n",
    ),
    "tool": (
        [USER],
        {"tools": [BARE]},
        '<|turn>system\n<|tool>declaration:now{description:<|"|><|"|>,parameters:{type:<|"|>OBJECT<|"|>}}<tool|>'
        "<turn|>\n" + USER_TEXT + "<|turn>model\n",
    ),
    "all-declared": (
        [SYSTEM, USER],
        {"tools": [SCHEMA, SCHEMA], "thinking": True},
        "<|turn>system\n<|think|>\nBe terse." + DECLARED * 2 + "<turn|>\n" + USER_TEXT + "<|turn>model\n",
    ),
    "open-call": ([USER, CALLING], {}, USER_TEXT + "<|turn>model\n" + THOUGHT + CALL_TEXT + "<|tool_response>"),
    "open-call-with-text": (
        [USER, {**CALLING, "content": "Wait."}],
        {},
        USER_TEXT + "<|turn>model\n" + THOUGHT + CALL_TEXT + "Wait.<|tool_response>",
    ),
    "result": ([USER, CALLING, RESULT], {}, USER_TEXT + "<|turn>model\n" + THOUGHT + CALL_TEXT + RESULT_TEXT),
    "result-with-text": (
        [USER, {**CALLING, "content": "Wait."}, RESULT],
        {},
        USER_TEXT + "<|turn>model\n" + THOUGHT + CALL_TEXT + RESULT_TEXT + "Wait.<turn|>\n<|turn>model\n",
    ),
    "answered": (
        [USER, CALLING, RESULT, answer("<|channel>thought\nhm<channel|>Sunny."), USER],
        {},
        USER_TEXT + "<|turn>model\n" + CALL_TEXT + RESULT_TEXT + "Sunny.<turn|>\n" + USER_TEXT + "<|turn>model\n",
    ),
    "two-rounds": (
        [USER, CALLING, RESULT, answer("", tool_calls=[CALL_NOW]), {**RESULT, "tool_call_id": "2"}, answer("Noon.")],
        {},
        USER_TEXT + "<|turn>model\n" + THOUGHT + CALL_TEXT + RESULT_TEXT + "<|tool_call>call:now{}<tool_call|>"
        '<|tool_response>response:now{value:<|"|> Sunny. <|"|>}<tool_response|>Noon.<turn|>\n<|turn>model\n',
    ),
    "two-calls": (
        [USER, answer("", tool_calls=[CALL, CALL_NOW]), {**RESULT, "tool_call_id": "2", "content": "9:00"}, RESULT],
        {},
        USER_TEXT + "<|turn>model\n" + CALL_TEXT + "<|tool_call>call:now{}<tool_call|>"
        '<|tool_response>response:now{value:<|"|>9:00<|"|>}<tool_response|>' + RESULT_TEXT,
    ),
    "named-and-unnamed": (
        [USER, answer("", tool_calls=[CALL_NOW]), {"role": "tool", "name": "f", "content": "x"}],
        {},
        USER_TEXT + "<|turn>model\n<|tool_call>call:now{}<tool_call|>"
        '<|tool_response>response:f{value:<|"|>x<|"|>}<tool_response|>',
    ),
}


@pytest.mark.parametrize("name", ROUNDS)
def test_a_conversation_is_written_as_by_the_released_template(name: str) -> None:
    messages, options, expected = ROUNDS[name]
    assert ChatTemplate(SOURCE, TOKENS).render(messages, **options) == "<bos>" + expected


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("name", ROUNDS)
def test_transformers_renders_the_same(name: str, add_generation_prompt: bool) -> None:
    messages, options, _ = ROUNDS[name]
    rendered, _ = render_jinja_template(
        [copy.deepcopy(messages)],
        tools=options.get("tools"),
        chat_template=SOURCE,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=options.get("thinking", False),
        **TOKENS,
    )
    ours = ChatTemplate(SOURCE, TOKENS).render(messages, add_generation_prompt=add_generation_prompt, **options)
    assert ours == rendered[0]
    assert not ours.endswith("<|turn>model\n") or add_generation_prompt


def test_a_conversation_that_grows_is_written_on() -> None:
    """What was rendered stays as it is, so that its keys and values can be kept."""
    messages, _, _ = ROUNDS["two-rounds"]
    template = ChatTemplate(SOURCE, TOKENS)
    texts = [template.render(messages[:num]) for num in (1, 2, 3, 4, 5, 6)]
    for shorter, longer in pairwise(texts):
        assert longer.startswith(shorter.removesuffix("<|tool_response>"))


def test_what_it_writes_of_a_call_is_read_back() -> None:
    raw = CALL_TEXT.removeprefix("<|tool_call>").removesuffix("<tool_call|>")
    assert parse_tool_call(raw).arguments == ARGUMENTS


def test_the_deepest_arguments_are_written() -> None:
    raw = "call:f" + "{a:" * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    call = {"function": {"name": "f", "arguments": parse_tool_call(raw).arguments}}
    assert raw in ChatTemplate(SOURCE, TOKENS).render([answer("", tool_calls=[call])])


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([STRAY], "tool at message 1"),
        ([USER, STRAY], "tool at message 2"),
        ([USER, answer("Hi."), STRAY], "tool at message 3"),
        ([USER, SYSTEM], "system at message 2"),
        ([USER, {**SYSTEM, "role": "developer"}], "developer at message 2"),
    ],
)
def test_an_unexpected_role_is_refused(messages: list[dict[str, Any]], place: str) -> None:
    with pytest.raises(
        RequestError, match=f"role {place}: expected user or assistant, system as the first, or tool be"
    ):
        ChatTemplate(SOURCE, TOKENS).render(messages)


def test_a_schema_without_one_type_is_refused() -> None:
    tool = copy.deepcopy(SCHEMA)
    tool["function"]["parameters"]["properties"]["city"] = {"enum": ["Rome"]}  # type: ignore[index]
    with pytest.raises(RequestError, match="tool weather: city has no type, or more than one"):
        ChatTemplate(SOURCE, TOKENS).render([USER], tools=[tool])


def test_the_checkpoint_has_the_same_template() -> None:
    copied = Path(CHAT_TEMPLATE).parent / "checkpoint" / "target" / "chat_template.jinja"
    assert copied.read_bytes() == CHAT_TEMPLATE.read_bytes()
