"""The chat template renders as transformers does, and a hostile one gets no further than its budget."""

import copy
import threading
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.utils.chat_template_utils import render_jinja_template

from runtime.chat import FILTERS, MAX_CHARS, ChatTemplate
from runtime.errors import ArtifactError, RequestError
from runtime.messages import guarded, plain_messages

TOKENS = {"bos_token": "<bos>", "eos_token": "<eos>"}
GEMMA_STYLE = """\
{%- macro strip_thinking(text) -%}
    {%- set ns = namespace(result='') -%}
    {%- for part in text.split('<channel|>') -%}
        {%- if '<|channel>' in part -%}
            {%- set ns.result = ns.result + part.split('<|channel>')[0] -%}
        {%- else -%}
            {%- set ns.result = ns.result + part -%}
        {%- endif -%}
    {%- endfor -%}
    {{- ns.result | trim -}}
{%- endmacro -%}
{%- macro arguments(value) -%}
    {%- for key, item in value | dictsort -%}
        {{- key ~ ':' ~ item | tojson -}}{%- if not loop.last %},{% endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- set rest = messages -%}
{{ bos_token }}
{%- if tools or messages[0]['role'] in ['system', 'developer'] -%}
    {{- '<|turn>system\\n' + messages[0]['content'] | trim + '<turn|>\\n' -}}
    {%- set rest = messages[1:] -%}
{%- endif %}
{%- for message in rest -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('roles must alternate') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{- '<|turn>' + role + '\\n' }}
    {%- for call in message.tool_calls or [] -%}
        {{- '<|tool_call>call:' + call.function.name + '{' + arguments(call.function.arguments) + '}<tool_call|>' -}}
    {%- endfor -%}
    {{- strip_thinking(message['content']) if role == 'model' else message['content'] | trim -}}
    {{- '<turn|>\\n' -}}
{%- endfor -%}
{%- if tools is not none %}tools{% endif %}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\\n' -}}
    {%- if not enable_thinking | default(false) %}{{ '<|channel>thought\\n<channel|>' }}{% endif -%}
{%- endif -%}
"""


def call_of(name: str, arguments: Any, **fields: Any) -> dict[str, Any]:
    return {**fields, "type": "function", "function": {"name": name, "arguments": arguments}}


USER = {"role": "user", "content": " Héllo <b> & 'you'\n"}
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": "Be  brief."}, USER],
    [USER, {"role": "assistant", "content": "<|channel>thought\nhm<channel|>Hi. "}, USER],
    [USER, {"role": "assistant", "content": "", "tool_calls": [call_of("f", {"b": [1, None], "a": "é"})]}],
]


TEXT = {"type": "text", "text": "a"}


def calling(calls: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": calls}


def deep(num_levels: int) -> Any:
    value: Any = "x"
    for _ in range(num_levels):
        value = [value]
    return value


def render(source: str, messages: Any = (USER,)) -> str:
    return ChatTemplate(source, TOKENS).render(messages)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_renders_as_transformers_does(messages: list[dict[str, Any]], add_generation_prompt: bool) -> None:
    rendered = ChatTemplate(GEMMA_STYLE, TOKENS).render(messages, add_generation_prompt=add_generation_prompt)
    assert rendered == by_transformers(GEMMA_STYLE, messages, add_generation_prompt)


@pytest.mark.parametrize(
    "source",
    [
        "  {% if true %}\n  a\n  {% endif %}\nb\n",  # trim_blocks and lstrip_blocks
        "{% for x in range(9) %}{% if x == 2 %}{% continue %}{% elif x > 5 %}{% break %}{% endif %}{{x}}{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': '<é>', 'a': 1.5} | tojson(sort_keys=true) }}",
        "{{ [1, 'a', none, true] | join(', ') }}{{ 1 ~ none ~ missing ~ 'x' }}{{ 7 | string + '7' }}",
        "{{ 'a-b-c'.replace('-', '+', 1) ~ 'a-b' | replace('-', '') ~ ', '.join(['x', 'y']) }}",
        "{% set text %}{% for m in messages %}{{ m.role }}{% endfor %}{% endset %}{{ text | upper * 3 }}",
        "{% macro twice(x) %}{{ x }}{{ caller() }}{% endmacro %}{% call twice(2.5) %}!{% endcall %}",
        "{{ 3000 * 2000 }} {{ 7 % 4 }} {{ 7 // 2 }} {{ 7 / 2 }} {{ -3 + 1 }} {{ [1] + [2] == [1, 2] }} {{ missing }}",
        "{% for row in [[1, [2]], [3]] recursive %}{{ loop(row) if row is iterable else row }}{% endfor %}",
        "{% set ns = namespace(a=1) %}{% set ns.b = dict(c=2) %}{{ ns.a }}{{ ns.b.c }}{{ ns.b.get('d', 'e') }}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v | trim | length }};{% endfor %}",
    ],
)
def test_each_feature_is_as_in_transformers(source: str) -> None:
    assert render(source) == by_transformers(source, [USER], True)


def by_transformers(source: str, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
    rendered, _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=add_generation_prompt, **TOKENS
    )
    return str(rendered[0])


def test_the_date_is_todays() -> None:
    assert render("{{ strftime_now('%Y') }}") in {str(datetime.now().year + offset) for offset in (-1, 0)}


@pytest.mark.parametrize("name", FILTERS)
def test_every_listed_filter_exists(name: str) -> None:
    ChatTemplate("{{ messages | " + name + " }}", TOKENS)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{{ raise_exception('no system\nrole') }}", r"line 2: no system role$"),
        ("a\n\n{{ messages[0].missing.deeper }}", r"line 3: .*has no attribute 'missing'"),
        ("{% macro m(x) %}\n{{ 1 // x }}\n{% endmacro %}\n{{ m(0) }}", r"line 2: ZeroDivisionError"),
        ("{% for x in [1] %}\n{{ undefined_function() }}{% endfor %}", r"line 2: 'undefined_function' is undefined"),
        ("{{ 'a' + 1 }}", r"line 1: TypeError"),
        ("{{ raise_exception(7) }}", r"line 1: 7$"),
        ("{{ raise_exception([7]) }}", r"line 1: list cannot be written"),
        ("{% include 'other' %}", r"line 1: TypeError: no loader"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", r"line 1: RecursionError"),
        ("\n{{ messages }}", r"line 2: list cannot be written as text; use the filter tojson"),
    ],
)
def test_an_error_names_the_line_of_the_template(source: str, message: str) -> None:
    with pytest.raises(RequestError, match=r"^chat template, " + message):
        render(source)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", r"^chat template, line 2: Expected an expression.*; re-export the model$"),
        ("a\n{{ 'x' | center(9) }}", r"^chat template, line 2: No filter named 'center'"),
        ("{% for x in y %}", r"^chat template, line 1: Unexpected end of template"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", r"^chat template: RecursionError"),
        ("{% for x in y %}" * 30 + "{% endfor %}" * 30, r"^chat template: SyntaxError: too many statically nested"),
    ],
)
def test_a_template_that_does_not_parse_is_a_damaged_artifact(source: str, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        ChatTemplate(source, TOKENS)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], r"a list of at least one mapping, got \[\]"),
        ("hello", r"a list of at least one mapping, got 'hello'"),
        (None, r"a list of at least one mapping, got None"),
        (["hello"], r"message 0 must be a mapping with role and content, got 'hello'"),
        ([USER, {"content": "x"}], r"message 1: role must be a string, got None"),
        ([{"role": "user", "content": 7}], r"message 0: content must be a string, got 7$"),
        ([{"role": "user", "content": None}], r"message 0: content must be a string, got None$"),
        ([{"role": "assistant", "tool_calls": []}], r"message 0: content must be a string, got None$"),
        (
            [{"role": "user", "content": ["x"]}],
            r"message 0: content holds 'x', expected parts of type 'text'; images and",
        ),
        (
            [{"role": "user", "content": [TEXT, {"type": "image_url", "image_url": {"url": "x" * 999}}]}],
            r"message 0: content holds {'image_url': .*, expected parts .*; images and audio are not there yet$",
        ),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], r"message 0: content holds .*, expected parts"),
        (
            [{"role": "user<turn|>", "content": "x"}],
            r"message 0: role 'user<turn\|>' is unknown; use system, developer",
        ),
        ([{**USER, "when": datetime.now()}], r"JSON values only: Object of type datetime"),
        ([{**USER, "n": float("nan")}], r"JSON values only: Out of range float values"),
        ([{**USER, (1, 2): "x"}], r"JSON values only: keys must be"),
        ([{**USER, "reasoning_content": 7}], r"message 0: reasoning_content must be a string, got 7$"),
        ([{**USER, "tool_calls": [call_of("f", {})]}], r"message 0: only an assistant's message can have tool_calls$"),
        ([calling("f")], r"message 0: tool_calls must be a list, got 'f'$"),
        (
            [calling(["f"])],
            r"message 0: tool_calls holds 'f', expected {'function': {'name': text, 'arguments': mapping",
        ),
        (
            [calling([{"name": "f", "arguments": {}}])],
            r"message 0: tool_calls holds {'arguments': {}, 'name': 'f'}, exp",
        ),
        (
            [calling([call_of("f", [1])])],
            r"message 0: tool_calls holds .*, expected .*'arguments': mapping or JSON text}}$",
        ),
        ([calling([call_of("f", "[1]")])], r"message 0: tool_calls holds .*mapping or JSON text}}$"),
        ([calling([call_of("f", '{"a": NaN}')])], r"message 0: tool_calls holds .*mapping or JSON text}}$"),
        ([calling([call_of("f", '{"a": 1e999}')])], r"message 0: tool_calls holds .*mapping or JSON text}}$"),
        ([calling([call_of("f", '{"a":' * 60_000)])], r"message 0: tool_calls holds .*mapping or JSON text}}$"),
        ([calling([call_of("f", '{"a":' * 90 + "1" + "}" * 90)])], r"message 0: tool_calls holds .*JSON text}}$"),
        ([calling([call_of("f", {}, id=7)])], r"message 0: the id of a tool call must be a string, got 7$"),
        (
            [USER, calling([call_of("f", {}, id="a")]), {"role": "tool", "tool_call_id": "b", "content": "x"}],
            r"message 2: no call before it has the id 'b'; answer one of the model's$",
        ),
        (
            [calling([call_of("f", {}, id="a")]), USER, {"role": "tool", "tool_call_id": "a", "content": "x"}],
            r"message 2: no call before it has the id 'a'",
        ),
        ([deep(60_000)], r"message 0 must be a mapping with role and content, got \[\["),
        ([{"role": deep(60_000), "content": "x"}], r"message 0: role must be a string, got \[\["),
        (
            [{"role": "user", "content": deep(60_000)}],
            r"message 0 is nested more than 80 levels deep; send what it holds",
        ),
        ([calling([call_of("f", {"a": deep(60_000)})])], r"message 0 is nested more than 80 levels deep"),
        ([{**USER, "x": deep(80)}], r"message 0 is nested more than 80 levels deep"),
    ],
)
def test_messages_are_checked(messages: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        render("x", messages)
    assert len(str(caught.value)) < 200
    assert "\n" not in str(caught.value)


def test_parts_of_text_are_one_text() -> None:
    assert plain_messages([{"role": "user", "content": [TEXT, {"type": "text", "text": " b"}]}])[0]["content"] == "a b"
    assert plain_messages([{"role": "user", "content": []}])[0]["content"] == ""


def test_a_call_needs_no_content_and_may_have_its_arguments_as_json() -> None:
    [made] = plain_messages([{**calling([call_of("f", '{"a": [1, null]}', id="7")]), "content": None, "name": None}])
    assert made == {"role": "assistant", "content": "", "tool_calls": [call_of("f", {"a": [1, None]}, id="7")]}
    [made] = plain_messages([calling([call_of("f", "", id=None)])])
    assert made["tool_calls"] == [call_of("f", {})]


def test_a_result_has_the_name_of_the_call_that_it_answers() -> None:
    calls = calling([call_of("f", {}, id="1"), call_of("g", {}, id="2")])
    results = [{"role": "tool", "tool_call_id": id_, "content": "x"} for id_ in ("2", "1")]
    assert [message["name"] for message in plain_messages([USER, calls, *results])[2:]] == ["g", "f"]
    [_, unnamed, named] = plain_messages([calls, {"role": "tool", "content": "x"}, {**results[0], "name": "h"}])
    assert (unnamed["name"], named["name"]) == ("unknown", "h")


def test_the_deepest_message_renders_and_is_guarded() -> None:
    messages = [{**USER, "x": deep(79)}, calling([call_of("f", '{"a":' * 76 + "1" + "}" * 76)])]
    assert guarded(plain_messages(messages), str) == plain_messages(messages)
    assert render("{{ (messages[1].tool_calls | tojson).count('{') }}", messages) == "78"


def test_messages_stay_the_callers() -> None:
    messages = [{"role": "user", "content": [TEXT]}, calling([call_of("f", "{}", id="1")])]
    before = copy.deepcopy(messages)
    plain_messages(messages)
    assert messages == before


def test_guarded_reaches_every_string() -> None:
    value = {"a": ["b", ("c", {"d": 1.5, "e": [True, None]})], 7: "f"}
    assert guarded(value, str.upper) == {"A": ["B", ["C", {"D": 1.5, "E": [True, None]}]], "7": "F"}


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__ }}{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''['__class__'].mro() }}",
        "{{ messages[0].__init__.__globals__ }}{{ messages.__len__() }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ raise_exception.__code__.co_consts }}",
        "{{ self.__init__.__globals__ }}{{ self._TemplateReference__context.environment }}",
        "{{ namespace.mro() }}",
        "{{ dict.fromkeys(range(3)) }}",
        "{{ dict.update(messages[0], {'role': 'x'}) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ namespace(**{'__call__': 1}) }}",
        "{{ '{0.__class__}'.format(1) }}",
        "{{ ('%s' % messages) }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ lipsum.__globals__['os'].popen('id') }}",
        "{% set f = strftime_now %}{{ f.__globals__.json }}",
        "{% for x in [1] %}{{ loop._iterator.gi_frame.f_back }}{{ loop.__class__() }}{% endfor %}",
    ],
)
def test_a_sandbox_escape_is_refused(source: str) -> None:
    messages = [copy.deepcopy(USER)]
    with pytest.raises(RequestError, match=r"^chat template, line 1: "):
        render(source, messages)
    assert messages == [USER]


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'a' * 10000000000 }}",
        "{{ 10000000000 * [1] }}",
        "{{ 9 ** 9 ** 9 ** 9 }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ 'a'.ljust(10000000000) }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ (1).to_bytes(10000000000, 'big') }}",
        "{{ [1] | tojson(indent=10000000000) }}",
        "{{ range(10000000000) | list }}",
        "{% set x = 'a' * 4000000 %}{{ x.replace('a', x) }}",
        "{% set x = 'a' * 4000000 %}{{ x | replace('', x) }}",
        "{% set x = 'a' * 4000000 %}{{ x | join(x) }}{{ x.join(x) }}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=3) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
        "{% macro m(n) %}{{ m(n + 1) if n < 99 }}{{ m(n + 1) if n < 99 }}{% endmacro %}{{ m(0) }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(99999) %}{{ 'a' * 100000 }}{% endfor %}",
        "{% for a in ['x'] recursive %}{{ loop(range(99999)) if a == 'x' }}{% endfor %}",
        "{% macro m() %}{{ 'a' * 4000000 }}{% endmacro %}{{ m() ~ m() }}",
        "{% set x %}{{ 'a' * 4000000 }}{{ 'a' * 4000000 }}{% endset %}",
    ],
)
def test_little_source_cannot_take_much_time_or_memory(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.chat.MAX_STEPS", 50_000)
    with pytest.raises(RequestError, match=r"^chat template(, line 1)?: "):
        render(source)


def test_a_list_of_itself_twice_and_so_on_is_cut_short_by_tojson(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.chat.MAX_CHARS", 100_000)
    with pytest.raises(RequestError, match=r"exceeds 100,000 characters"):
        render(
            "{% set n = namespace(x=1) %}{% for i in range(40) %}{% set n.x = [n.x, n.x] %}{% endfor %}{{n.x|tojson}}"
        )


def test_the_bounds_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.chat.MAX_STEPS", 50_000)
    with pytest.raises(RequestError, match=r"more than 50,000 steps"):
        render("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}")
    with pytest.raises(RequestError, match=rf"exceeds {MAX_CHARS:,} characters"):
        render("{{ 'a' * 10000000000 }}")


def test_the_time_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.chat.MAX_SECONDS", 0.05)
    with pytest.raises(RequestError, match=r"more than 0.05 s"):
        render("{% for a in range(9999) %}{% set b = range(99999) | list %}{% endfor %}")


def test_a_long_conversation_stays_far_inside_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.chat.MAX_STEPS", 20 * 1000)
    turn = [USER, {"role": "assistant", "content": "Hi."}]
    assert render(GEMMA_STYLE, turn * 500).count("<|turn>") == 1001


def test_a_template_may_look_back_from_each_of_a_thousand_messages() -> None:
    """As Gemma 4's does, to tell whether a turn goes on."""
    source = (
        "{% for m in messages %}{% set ns = namespace(found=false) %}{% for j in range(loop.index0 - 1, -1, -1) %}"
        "{% if not ns.found %}{% set ns.found = messages[j]['role'] != 'tool' %}{% endif %}{% endfor %}"
        "{{ ns.found }}{% endfor %}"
    )
    assert ChatTemplate(source, TOKENS).render([USER] * 1000) == "False" + "True" * 999


def test_threads_have_a_budget_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.chat.MAX_STEPS", 50_000)
    template = ChatTemplate("{% for a in range(20000) %}{% endfor %}ok", TOKENS)
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(template.render([USER]))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == ["ok"] * 3


def test_generation_tags_of_training_templates_are_passed_over() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    assert ChatTemplate(source, {}).render([{"role": "user", "content": "hello"}]) == "hello"


PIECES = (
    """
{{ messages }} | {{ messages|tojson }} | {{ messages[0]['content'] * 9 }} | {% for m in messages %} | {% endfor %}
{% for i in range(999999) %} | {% macro f(x) %} | {% endmacro %} | {{ f(f) }} | {{ f(1) }} | {% set x = [1] %}
{% set x = x + x %} | {{ x }} | {% if tools %} | {% else %} | {% endif %} | {{ 9 ** 9 }} | {{ ''.__class__ }}
{{ x|attr('__init__') }} | {{ undefined.y }} | {{ 'a' % x }} | {{ (x, x)|join }} | {{ strftime_now('%Y') }}
{{ raise_exception(x) }} | {% include 'x' %} | {{ | }} | {% | %} | {% set ns = namespace(a=x) %} | {% set ns.a = ns %}
{{ ns }} | {{ x[0:9:0] }} | {{ tools|map('upper') }} | {{ tools }} | {% set x = messages %} | {{ x|length }}
""".strip()
    .replace("\n", " | ")
    .split(" | ")
)


@given(st.lists(st.sampled_from(PIECES) | st.text(max_size=6), max_size=12))
@settings(max_examples=300, deadline=None)
def test_any_template_renders_or_is_refused_in_one_line(pieces: list[str]) -> None:  # 79
    try:
        text = ChatTemplate("".join(pieces), TOKENS).render([USER], tools=[{"type": "function"}], thinking=True)
    except (ArtifactError, RequestError) as error:
        assert "\n" not in str(error)
    else:
        assert len(text) <= MAX_CHARS
