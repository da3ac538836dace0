"""A tool call is read as it was written, or refused in one line; never guessed, never slow, never a crash."""

import json
import math
import re
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.cli.serving.utils import _RESPONSE_TEMPLATE_FALLBACKS
from transformers.utils.chat_parsing import parse_response

from runtime.errors import ToolCallError
from runtime.tool_calls import MAX_DEPTH, MAX_NUMBER_CHARS, QUOTE, ToolCall, parse_tool_call

GEMMA4 = _RESPONSE_TEMPLATE_FALLBACKS[("gemma4",)]
MAX_SECONDS = 2.0  # of any one call; the longest here take some 0.2 s

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda text: QUOTE not in text)
plain_texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<\x01\x02"), max_size=12)
numbers = st.integers(-(10**300), 10**300) | st.floats(allow_nan=False, allow_infinity=False)


def arguments_of(keys: Any, strings: Any) -> Any:
    """Arguments of a call: mappings of JSON values."""
    leaves = st.none() | st.booleans() | numbers | strings
    values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3))
    return st.dictionaries(keys, values, max_size=4)


def written(value: Any) -> str:
    """A value as Gemma 4 writes it."""
    if isinstance(value, str):
        return QUOTE + value + QUOTE
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{written_key(key)}:{written(one)}' for key, one in value.items())}}}"
    return json.dumps(value)


def written_key(key: str) -> str:
    return key if re.fullmatch(r"[\w$.-]+", key) else QUOTE + key + QUOTE


def by_transformers(raw: str) -> ToolCall:
    answer = parse_response(f"<|tool_call>{raw}<tool_call|>", GEMMA4, prefix="<|turn>model\n")
    [call] = answer["tool_calls"]
    return ToolCall(**call["function"])


@pytest.mark.parametrize(
    ("raw", "name", "arguments"),
    [
        ("call:f{}", "f", {}),
        ('call:get_weather{city:<|"|>Rome<|"|>,n:42}', "get_weather", {"city": "Rome", "n": 42}),
        ("call:f{a:true,b:false,c:null}", "f", {"a": True, "b": False, "c": None}),
        ("call:f{a:-0.5e3,b:1E+2,c:-0,d:0}", "f", {"a": -500.0, "b": 100.0, "c": 0, "d": 0}),
        ("call:f{a:[],b:{},c:[1,[2,{d:[3]}]]}", "f", {"a": [], "b": {}, "c": [1, [2, {"d": [3]}]]}),
        ('call:f{a:<|"|><|"|>}', "f", {"a": ""}),
        ('call:f{a:<|"|>},b:{"\n\\ <tool_call|><|"|>}', "f", {"a": '},b:{"\n\\ <tool_call|>'}),
        ('call:f{"a":"x\\n\\u00e9{b:1}"}', "f", {"a": "x\né{b:1}"}),
        ('call:f{<|"|>a b<|"|>:1}', "f", {"a b": 1}),
        ("call:f{é:1,$ref:2,a-b.c:3,4:4}", "f", {"é": 1, "$ref": 2, "a-b.c": 3, "4": 4}),
        (" call:_a-b.c9 { a : [ 1 , 2 ] ,\n b : 3 }\n", "_a-b.c9", {"a": [1, 2], "b": 3}),
    ],
)
def test_a_call_is_read(raw: str, name: str, arguments: dict[str, Any]) -> None:
    assert parse_tool_call(raw) == ToolCall(name, arguments)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("", r"expected 'call:' and a name at character 0, found the end$"),
        ("f{}", r"expected 'call:' and a name at character 0, found 'f{}': 'f{}'"),
        ("call: f{}", r"expected 'call:' and a name at character 0"),
        ("call:1f{}", r"expected 'call:' and a name at character 0"),
        ("call:é{}", r"expected 'call:' and a name at character 0"),
        ("call:" + "f" * 129 + "{}", r"expected { at character 133, found 'f{}'"),
        ("call:f", r"expected { at character 6, found the end"),
        ("call:f[1]", r"expected { at character 6, found '\[1\]'"),
        ("call:f{a:1} x", r"expected the end at character 12, found 'x'"),
        ("call:f{}call:g{}", r"expected the end at character 8, found 'call:g{}'"),
        ("call:f{,}", r"expected a key at character 7, found ',}'"),
        ("call:f{a:1,}", r"expected a key at character 11, found '}'"),
        ("call:f{a}", r"expected a colon at character 8, found '}'"),
        ("call:f{a:1 b:2}", r"expected a comma or } at character 11, found 'b:2}'"),
        ("call:f{a:1", r"expected a comma or } at character 10, found the end"),
        ("call:f{a:1,a:2}", r"expected a key that was not there before at character 11, found 'a:2}'"),
        ('call:f{a:1,<|"|>a<|"|>:2}', r"expected a key that was not there before at character 11"),
        ("call:f{a:}", r"expected a value at character 9, found '}'"),
        ("call:f{a:tru}", r"expected a value at character 9"),
        ("call:f{a:True}", r"expected a value at character 9"),
        ("call:f{a:NaN}", r"expected a value at character 9"),
        ("call:f{a:Rome}", r"expected a value at character 9, found 'Rome}'"),
        ("call:f{a:+1}", r"expected a value at character 9"),
        ("call:f{a:.5}", r"expected a value at character 9"),
        ("call:f{a:01}", r"expected a comma or } at character 10"),
        ("call:f{a:1.}", r"expected a comma or } at character 10"),
        ("call:f{a:1e999}", r"expected a finite number at character 9"),
        ("call:f{a:" + "1" * (MAX_NUMBER_CHARS + 1) + "}", r"expected a value at character 9"),
        ("call:f{a:[1,]}", r"expected a value at character 12, found '\]}'"),
        ("call:f{a:[1 2]}", r"expected a comma or \] at character 12, found '2\]}'"),
        ("call:f{a:[b:1]}", r"expected a value at character 10"),
        ('call:f{a:<|"|>x}', r'expected a second <\|"\|> at character 16, found the end'),
        ('call:f{a:"x}', r"expected a value at character 9"),
        ('call:f{a:"\n"}', r"expected a value at character 9"),
        ('call:f{a:"\\x"}', r"expected a JSON string at character 9"),
        ('call:f{a:"\\ud800"}', r"expected a JSON string at character 9"),
        ("call:f" + "{a:" * 65, r"expected at most 64 levels at character 198, found '{a:'"),
        ("call:f{a:" + "[" * 100_000, r"expected at most 64 levels at character 72"),
    ],
)
def test_what_is_no_call_is_refused_in_one_line(raw: str, message: str) -> None:
    with pytest.raises(ToolCallError, match="^tool call: " + message) as caught:
        parse_tool_call(raw)
    assert caught.value.raw == raw
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 160


def test_the_most_levels_and_the_longest_number_are_read() -> None:
    assert parse_tool_call("call:f" + "{a:" * MAX_DEPTH + "1" + "}" * MAX_DEPTH)
    digits = "1" * MAX_NUMBER_CHARS
    assert parse_tool_call(f"call:f{{a:{digits}}}").arguments == {"a": int(digits)}


@settings(deadline=None)
@given(arguments_of(texts, texts))
def test_a_call_that_was_written_is_read_back(arguments: dict[str, Any]) -> None:
    read = parse_tool_call("call:f" + written(arguments)).arguments
    assert json.dumps(read) == json.dumps(arguments)  # as 1 == 1.0 == True


@settings(deadline=None)
@given(arguments_of(st.from_regex(r"\A[a-zA-Z_0-9]{1,8}\Z"), plain_texts))
def test_transformers_reads_the_same(arguments: dict[str, Any]) -> None:
    raw = "call:f" + written(arguments)
    assert json.dumps(parse_tool_call(raw).arguments) == json.dumps(by_transformers(raw).arguments)


def check(raw: str) -> None:
    start = time.thread_time()  # other processes' work does not count
    try:
        call = parse_tool_call(raw)
    except ToolCallError as error:
        call = None
        assert error.raw == raw
        assert "\n" not in str(error)
    assert time.thread_time() - start < MAX_SECONDS
    assert call is None or json.loads(json.dumps(call.arguments, allow_nan=False)) == call.arguments


marks = st.sampled_from(["call:", "f", "{", "}", "[", "]", ":", ",", QUOTE, '"', "\\", "\\u", "a", "1", "-", ".", "e9"])


@settings(deadline=None)
@given(st.lists(marks | st.text(max_size=2), max_size=30).map("".join))
def test_any_text_is_a_call_or_refused(text: str) -> None:
    check(text)
    check("call:f{" + text)


@settings(deadline=None)
@given(arguments_of(texts, texts), st.data())
def test_a_call_with_a_change_is_a_call_or_refused(arguments: dict[str, Any], data: st.DataObject) -> None:
    raw = "call:f" + written(arguments)
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(len(raw), start + 4)))
    check(raw[:start] + data.draw(marks | st.text(max_size=2)) + raw[stop:])
    check(raw[:start])


@pytest.mark.parametrize(
    "raw",
    [
        "call:f" + "{a:" * 100_000 + "1" + "}" * 100_000,
        "call:f{a:" + "[" * 100_000 + "]" * 100_000 + "}",
        "call:f{a:" + '["' * 100_000,
        "call:f{a:" + '"\\' * 100_000,
        "call:f{a:" + '"' + "\\" * 100_001,
        "call:f{" + "a" * 1_000_000,
        "call:f{a:" + "1" * 1_000_000,
        "call:f{a:1." + "1" * 1_000_000,
        "call:f{a:[" + "1," * 200_000 + "1]}",
        "call:f{" + ",".join(f"a{number}:1" for number in range(100_000)) + "}",
        "call:f{a:[" + (QUOTE + QUOTE + ",") * 100_000 + QUOTE,
        " " * 1_000_000,
        "call:" + "f" * 1_000_000,
        "call:f" + " " * 1_000_000,
    ],
)
def test_a_long_text_takes_no_long_time(raw: str) -> None:
    check(raw)


# Where transformers' parser, which replaces marks and reads JSON, is not right: what it makes of a text, and why.
UNLIKE_TRANSFORMERS = {
    "a key twice: the first value is lost": ("call:f{a:1,a:2}", {"a": 2}, "a key that was not there before"),
    "NaN is no JSON": ("call:f{a:NaN}", {"a": math.nan}, "a value"),
    "more than a float holds": ("call:f{a:1e999}", {"a": math.inf}, "a finite number"),
    "half a character": ('call:f{a:"\\ud800"}', {"a": "\ud800"}, "a JSON string"),
    "arguments that are no mapping": ("call:f[1]", [1], "{"),
    "a name that no function can have": ("call:1f{}", {}, "'call:' and a name"),
    "a name with a dash, as schemas may have": ("call:f-g{a:1}", ValueError, {"a": 1}),
    "a bare key with a dash": ("call:f{a-b:1}", ValueError, {"a-b": 1}),
    "its own marks in a text": (f"call:f{{a:{QUOTE}\x01{QUOTE}}}", ValueError, {"a": "\x01"}),
    "the end mark in a text": (f"call:f{{a:{QUOTE}<tool_call|>{QUOTE}}}", ValueError, {"a": "<tool_call|>"}),
    "deep nesting": ("call:f" + "{a:" * 100_000, RecursionError, "at most 64 levels"),
}


@pytest.mark.parametrize("why", UNLIKE_TRANSFORMERS)
def test_where_transformers_is_not_right(why: str) -> None:
    raw, theirs, ours = UNLIKE_TRANSFORMERS[why]
    if isinstance(theirs, type):
        with pytest.raises(theirs):
            by_transformers(raw)
    else:
        assert repr(by_transformers(raw).arguments) == repr(theirs)
    if isinstance(ours, dict):
        assert parse_tool_call(raw).arguments == ours
    else:
        with pytest.raises(ToolCallError, match=f"expected {ours} at character"):
            parse_tool_call(raw)
