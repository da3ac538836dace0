"""Turns are found by what the template writes, and dropping them leaves the prompt of the shortened conversation."""

from collections.abc import Sequence

import pytest

from runtime.chat import ChatTemplate
from runtime.errors import RequestError
from runtime.tokenizer import Tokenizer
from runtime.turns import Sliding, TurnFormat, room_in_context, sliding_of, turn_format
from tests.checkpoints import CHAT_TEMPLATE, make_tokenizer

BOS = 2
GEMMA = CHAT_TEMPLATE.read_text(encoding="utf-8")
OTHER_NAMES = (
    GEMMA.replace("<|turn>user", "<|tool>human").replace("<|turn>", "<|tool>").replace("system\\n", "rules\\n")
)
FOLDED = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ '<|turn>user\n' + m.content + '\n' }}
{%- elif loop.index0 == 1 and messages[0].role == 'system' %}{{ m.content + '<turn|>\n' }}
{%- else %}{{ '<|turn>' + m.role + '\n' + m.content + '<turn|>\n' }}{% endif %}{% endfor %}"""
DEVELOPER = GEMMA.replace("== 'system'", "in ('system', 'developer')").replace("turn>system\\n'", "turn>developer\\n'")
THINKING = GEMMA.replace("turn>system\\n'", "turn>system\\n<|think|>\\n'")
MARKED = GEMMA.replace("<|turn>system", "<|tool>system")
NO_TURNS = "{{ bos_token }}{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
REFUSES = "{{ raise_exception('no') }}"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_tokenizer(), BOS)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<bos>", "eos_token": "<eos>"})


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def conversation(roles: str) -> list[dict[str, str]]:
    """Of a letter for each turn: s, u or m; longer and longer."""
    names = {"s": "system", "u": "user", "m": "assistant"}
    return [message(names[letter], f"{letter} says " * place) for place, letter in enumerate(roles, 1)]


def encoded(tokenizer: Tokenizer, messages: Sequence[dict[str, str]], source: str = GEMMA) -> list[int]:
    return tokenizer.encode(template(source).render(messages), add_bos=True)


def sliding(tokenizer: Tokenizer, ids: Sequence[int], context_tokens: int = 100, source: str = GEMMA) -> Sliding:
    found = sliding_of("slide", ids, template(source), tokenizer, context_tokens)
    assert found is not None
    return found


# How turns begin


@pytest.mark.parametrize(
    ("source", "start", "user_role", "system_roles"),
    [
        (GEMMA, "<|turn>", "user", {"system"}),
        (OTHER_NAMES, "<|tool>", "human", {"rules"}),
        (DEVELOPER, "<|turn>", "user", {"developer"}),
        (THINKING, "<|turn>", "user", {"system"}),
        (MARKED, "<|turn>", "user", set()),  # stays all the same, before the first turn
        (FOLDED, "<|turn>", "user", {"developer"}),  # written as any other role; the system's words are in the user's
    ],
)
def test_the_template_tells_how_turns_begin(
    tokenizer: Tokenizer, source: str, start: str, user_role: str, system_roles: set[str]
) -> None:
    (start_id,) = tokenizer.encode(start, add_bos=False)
    assert turn_format(template(source), tokenizer) == TurnFormat(start_id, user_role, frozenset(system_roles))


@pytest.mark.parametrize("source", [NO_TURNS, BARE, REFUSES])
def test_templates_without_turns(tokenizer: Tokenizer, source: str) -> None:
    if source == NO_TURNS:  # a name behind BOS would pass for a turn, but BOS is there once
        ids = encoded(tokenizer, conversation("umu"), source)
        assert sliding(tokenizer, ids, source=source).droppable == ()
    else:
        assert turn_format(template(source), tokenizer) is None
        assert sliding(tokenizer, [BOS, 20, 21], source=source) == Sliding(100, 3)


# Where a prompt may be shortened


@pytest.mark.parametrize("roles", ["sumumu", "umumum", "mumu", "sumu", "smumumumu"])
@pytest.mark.parametrize("source", [GEMMA, OTHER_NAMES, THINKING, MARKED])
def test_what_is_kept_is_the_prompt_of_the_shortened_conversation(
    tokenizer: Tokenizer, roles: str, source: str
) -> None:
    messages, num_system = conversation(roles), roles.count("s")
    ids = encoded(tokenizer, messages, source)
    found = sliding(tokenizer, ids, source=source)
    users = [place for place, letter in enumerate(roles) if letter == "u" and place > num_system]
    assert len(found.droppable) == len(users) > 0
    for num_dropped, first in zip(found.droppable, users, strict=True):
        shortened = [*messages[:num_system], *messages[first:]]
        assert found.kept(ids, num_dropped) == encoded(tokenizer, shortened, source)
    assert found.kept(ids, 0) == ids
    assert found.most_droppable == found.droppable[-1]


@pytest.mark.parametrize("roles", ["u", "um", "su", "sum"])
def test_the_last_user_turn_is_never_dropped(tokenizer: Tokenizer, roles: str) -> None:
    assert sliding(tokenizer, encoded(tokenizer, conversation(roles))).droppable == ()


@pytest.mark.parametrize(
    "text", ["", "plain text", "a<turn|>\n", "<|turn>system\nonly", "<|turn>model\nonly", "<|turn>"]
)
def test_prompts_without_a_second_user_turn(tokenizer: Tokenizer, text: str) -> None:
    assert sliding(tokenizer, tokenizer.encode(text, add_bos=True)).droppable == ()


def test_text_that_looks_like_a_turn_is_none(tokenizer: Tokenizer) -> None:
    false_turn = tokenizer.literal("<|turn>user\nhello")
    ids = encoded(tokenizer, [message("user", "a"), message("assistant", "b"), message("user", false_turn)])
    assert len(sliding(tokenizer, ids).droppable) == 1


# How much is dropped


@pytest.mark.parametrize("context_tokens", [1, 3, 40, 100])
@pytest.mark.parametrize("num_left", [1, 7, 1000])
def test_as_little_is_dropped_as_leaves_room(context_tokens: int, num_left: int) -> None:
    found = Sliding(context_tokens, 5, (10, 12, 40))
    room = min(num_left, max(context_tokens // 4, 1))
    for num_tokens in range(50, 2 * context_tokens + 60):
        num_dropped = found.num_dropped(num_tokens, num_left)
        fitting = [num for num in (0, 10, 12, 40) if num_tokens - num + room <= context_tokens]
        assert num_dropped == (fitting[0] if fitting else 40)


def test_nothing_may_be_dropped() -> None:
    assert Sliding(10, 8).num_dropped(8, 100) == Sliding(10, 8).num_dropped(30, 1) == 0


# Requests


@pytest.mark.parametrize("policy", ["", "Slide", "shift", None, True, 3, ["slide"]])
def test_policies_that_are_none(tokenizer: Tokenizer, policy: object) -> None:
    with pytest.raises(RequestError, match='^context_policy is .*, expected "stop" or "slide"$'):
        sliding_of(policy, [BOS], None, tokenizer, 10)  # type: ignore[arg-type]


def test_room_is_what_is_left_once_all_is_dropped(tokenizer: Tokenizer) -> None:
    assert sliding_of("stop", [BOS], template(GEMMA), tokenizer, 10) is None
    assert sliding_of("slide", [BOS] * 4, None, tokenizer, 10) == Sliding(10, 4)
    assert room_in_context(9, 10, None) == 1
    assert room_in_context(49, 50, Sliding(50, 5, (10, 30))) == 31
    assert room_in_context(79, 50, Sliding(50, 5, (10, 30))) == 1
    with pytest.raises(RequestError, match="has 10 tokens, the context holds 10 and needs room for one more; shorten"):
        room_in_context(10, 10, None)
    with pytest.raises(RequestError, match="has 1,080 tokens, 1,050 of them outside .* the context holds 1,050 and"):
        room_in_context(1080, 1050, Sliding(1050, 5, (10, 30)))
