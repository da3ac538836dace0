"""A chat that outgrows the context goes on as the conversation without its oldest turns would, to the token.

What is dropped, and when, is computed here anew from the messages; the runtime sees token ids only.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from edge import Generation, InferenceError, RequestError, Runtime
from runtime.layout import Layout
from runtime.prompt_lookup import PromptLookup
from tests.lasting import CONTEXT, PROFILE, Load, forget, greedy, hooked, open_runtime
from tests.layouts import each_layout

SYSTEM = {"role": "system", "content": "def"}
ROOM = CONTEXT // 4
DRAFTS = (0, 1, 3, 16, None)


def exchanges(num_user_turns: int, content: str = "x") -> list[dict[str, str]]:
    """Turns that begin and end with a user's; each is another."""
    roles = ("user", "assistant")
    return [{"role": roles[turn % 2], "content": f"{content}{turn}"} for turn in range(2 * num_user_turns - 1)]


@dataclass
class Chat:
    """A conversation with a runtime that knows no end of sequence."""

    runtime: Runtime
    messages: list[dict[str, str]]

    def prompt(self, num_dropped: int = 0) -> list[int]:
        """Of the conversation without its oldest exchanges."""
        return self.runtime.chat_prompt([SYSTEM, *self.messages[2 * num_dropped :]])

    def slide(self, **options: Any) -> Generation:
        return greedy(self.runtime, self.prompt(), **({"context_policy": "slide", "max_tokens": None} | options))

    def kept(self, num_generated: int, num_left: int) -> list[int]:
        """The longest prompt that leaves the room that the policy promises, or else the shortest."""
        context = self.runtime.context_tokens
        room = min(num_left, context // 4)
        prompts = [self.prompt(num) for num in range((len(self.messages) + 1) // 2)]
        return next((prompt for prompt in prompts if len(prompt) + num_generated + room <= context), prompts[-1])

    def by_fresh_generations(self, max_tokens: int, **options: Any) -> list[list[int]]:
        """What fresh generations give until the context is full: of the kept turns and all generated before."""
        context, stretches, num_generated = self.runtime.context_tokens, [], 0
        while num_generated < max_tokens:
            generated = [token for stretch in stretches for token in stretch]
            prompt = [*self.kept(num_generated, max_tokens - num_generated), *generated]
            if len(prompt) >= context:
                break
            num_tokens = min(max_tokens - num_generated, context - len(prompt))
            forget(self.runtime)
            stretches.append(greedy(self.runtime, prompt, max_tokens=num_tokens, **options).token_ids)
            num_generated += num_tokens
        return stretches


@pytest.fixture
def chat(load: Load) -> Chat:
    return Chat(load(), exchanges(4))


@pytest.fixture(params=each_layout)
def demo_chat(request: pytest.FixtureRequest, demo_artifact: Callable[..., Path]) -> Iterator[Chat]:
    layout: Layout = request.param
    profile = replace(PROFILE, prefill_chunk_tokens=48)
    with open_runtime(demo_artifact(4, layout), profile) as runtime:
        yield Chat(runtime, exchanges(3, "What does zip do? "))


def joined(stretches: list[list[int]]) -> list[int]:
    return [token for stretch in stretches for token in stretch]


# The law


def test_a_slide_goes_on_as_the_shortened_conversation(chat: Chat) -> None:  # 69
    stretches = chat.by_fresh_generations(1000, num_draft_tokens=0)
    assert len(stretches) == 3  # two slides, each over many windows
    for num_drafts in DRAFTS:
        made = chat.slide(num_draft_tokens=num_drafts)
        assert made.token_ids == joined(stretches)
        assert made.stats.num_slides == 2
        assert made.stats.num_dropped_tokens == len(chat.prompt()) - len(chat.prompt(3))
        assert made.stats.num_drafted > 0 or not num_drafts


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_however_it_is_cut_into_chunks(load: Load, chunk: int) -> None:
    chat = Chat(load(prefill_chunk_tokens=chunk), exchanges(4))
    assert chat.slide(num_draft_tokens=3).token_ids == joined(chat.by_fresh_generations(1000))


def test_the_demo_goes_on_as_the_shortened_conversation(demo_chat: Chat) -> None:
    stretches = demo_chat.by_fresh_generations(100, num_draft_tokens=0)
    assert len(stretches) == 3
    assert demo_chat.slide(max_tokens=100, num_draft_tokens=0).token_ids == joined(stretches)
    if demo_chat.runtime.manifest.layout == "native":  # the portable layout with int8 activations rounds by width
        for num_drafts in (1, 3, None):
            assert demo_chat.slide(max_tokens=100, num_draft_tokens=num_drafts).token_ids == joined(stretches)


def test_a_slide_is_seen_in_the_tokens(chat: Chat) -> None:
    """What the law holds depends on what was dropped: other kept turns give other tokens."""
    first, second, _ = chat.by_fresh_generations(1000)
    others = [greedy(chat.runtime, [*chat.prompt(num), *first], max_tokens=len(second)).token_ids for num in (1, 2)]
    assert second in others
    assert others[0] != others[1]


# Ends


def test_max_tokens_count_over_slides(chat: Chat) -> None:  # 63, 68
    for max_tokens in (1, 20, 29, 30, 31, 60, 70, 75, 90):
        expected = joined(chat.by_fresh_generations(max_tokens))
        for num_drafts in (0, 3, 16):
            made = chat.slide(max_tokens=max_tokens, num_draft_tokens=num_drafts)
            assert made.token_ids == expected
            assert len(expected) == made.stats.num_generated_tokens == max_tokens
            assert (made.finish_reason, made.context_full) == ("length", False)


@pytest.mark.parametrize("policy", ["stop", "slide"])
def test_the_result_tells_a_full_context_from_max_tokens(chat: Chat, policy: str) -> None:  # 61
    least = chat.prompt(3 if policy == "slide" else 0)
    num_fitting = CONTEXT - len(least)
    for max_tokens, context_full in ((None, True), (num_fitting + 1, True), (num_fitting, False), (3, False)):
        made = chat.slide(max_tokens=max_tokens, context_policy=policy)
        assert (made.finish_reason, made.context_full) == ("length", context_full)
        assert len(made.token_ids) == min(max_tokens or num_fitting, num_fitting)
    chat.runtime.manifest.generation["eos_token_ids"] = made.token_ids[:1]
    made = chat.slide(context_policy=policy)
    assert (made.finish_reason, made.context_full) == ("stop", False)


def test_an_end_where_the_context_is_full_slides_no_more(chat: Chat) -> None:
    first, *_ = chat.by_fresh_generations(1000)
    assert first[-1] not in first[:-1]
    forget(chat.runtime)
    chat.runtime.manifest.generation["eos_token_ids"] = [first[-1]]
    made = chat.slide()
    assert (made.token_ids, made.finish_reason) == (first, "stop")
    assert (made.stats.num_slides, made.stats.num_prefilled_tokens) == (0, len(chat.prompt()))


# Text


@pytest.mark.parametrize("num_drafts", [0, 3])
def test_pieces_are_the_text(chat: Chat, num_drafts: int) -> None:
    made = chat.slide(num_draft_tokens=num_drafts)
    pieces = chat.runtime.stream(chat.prompt(), temperature=0.0, num_draft_tokens=num_drafts, context_policy="slide")
    assert "".join(pieces) == made.text == chat.runtime._loaded.tokenizer.decode(made.token_ids)


def test_a_stop_string_over_a_slide(demo_chat: Chat) -> None:  # 67
    options: dict[str, Any] = {"max_tokens": 60, "num_draft_tokens": 0, "temperature": 1.0, "seed": 1}
    made, decode = demo_chat.slide(**options), demo_chat.runtime._loaded.tokenizer.decode
    num_first = CONTEXT - len(demo_chat.prompt())
    place = len(decode(made.token_ids[:num_first]))
    stops = (made.text[place - num : place + num] for num in range(1, place))
    stop = next(stop for stop in stops if made.text.find(stop) == place - len(stop) // 2)
    stopped = demo_chat.slide(**options, stop=[stop])
    assert stopped.text == made.text[: made.text.find(stop)]
    assert (stopped.finish_reason, stopped.stats.num_slides) == ("stop", 1)
    assert num_first < len(stopped.token_ids) < 60


# Prompts


def test_a_prompt_of_ten_contexts(load: Load) -> None:  # 61
    chat = Chat(load(), exchanges(55))
    assert len(chat.prompt()) > 10 * CONTEXT
    with pytest.raises(RequestError, match=r"has 1,[0-9]{3} tokens, the context holds 120 .*context_policy=\"slide\""):
        chat.slide(context_policy="stop")
    kept = chat.kept(0, 20)
    made = chat.slide(max_tokens=20, num_draft_tokens=3)
    assert made.token_ids == greedy(chat.runtime, kept, max_tokens=20).token_ids
    assert CONTEXT - 20 - 27 < len(kept) <= CONTEXT - 20
    assert (made.stats.num_slides, made.stats.num_prefilled_tokens) == (1, len(kept))
    assert made.stats.num_dropped_tokens == len(chat.prompt()) - len(kept)
    assert made.stats.num_prompt_tokens == len(chat.prompt())


def test_a_prompt_that_leaves_too_little_room(load: Load) -> None:
    """Turns are dropped for `max_tokens`, but for no more than a quarter of the context."""
    chat = Chat(load(), exchanges(5))
    num_free = CONTEXT - len(chat.prompt())
    assert 1 < num_free < ROOM
    one_dropped, two_dropped = (len(chat.prompt()) - len(chat.prompt(num)) for num in (1, 2))
    assert one_dropped + num_free == ROOM
    for max_tokens, num_slides, num_dropped in (
        (num_free, 0, 0),
        (num_free + 1, 1, one_dropped),
        (ROOM, 1, one_dropped),
        (ROOM + 1, 2, two_dropped),  # the second one where the context is full
    ):
        stats = chat.slide(max_tokens=max_tokens).stats
        assert (stats.num_slides, stats.num_dropped_tokens) == (num_slides, num_dropped)


def test_a_last_turn_that_does_not_fit(load: Load) -> None:  # 61
    long_turn = {"role": "user", "content": "7" * CONTEXT}
    chat = Chat(load(), [*exchanges(2)[:2], long_turn])
    num_tokens, least = len(chat.prompt()), len(chat.prompt(1))
    match = (
        f"the prompt has {num_tokens} tokens, {least} of them outside the turns that may be dropped, the context holds "
        "120 and needs room for one more; shorten the system's or the last user's turn or load with a larger context"
    )
    with pytest.raises(RequestError, match=match):
        chat.slide()


def test_plain_text_has_no_turns(runtime: Runtime, plain: list[int]) -> None:  # 61
    options: dict[str, Any] = {"context_policy": "slide"}
    with pytest.raises(RequestError, match="has 1,200 tokens, 1,200 of them outside the turns that may be dropped"):
        greedy(runtime, [2] * (10 * CONTEXT), **options)
    made = greedy(runtime, max_tokens=None, **options)
    assert made.token_ids[: len(plain)] == plain
    assert (len(made.token_ids), made.context_full, made.stats.num_slides) == (CONTEXT - 4, True, 0)
    assert greedy(runtime, [2] * (CONTEXT - 1), **options).context_full


def test_a_policy_that_is_none(runtime: Runtime) -> None:
    with pytest.raises(RequestError, match='context_policy is \'shift\', expected "stop" or "slide"'):
        greedy(runtime, context_policy="shift")


def test_chat_takes_the_policy(chat: Chat) -> None:
    options: dict[str, Any] = {"temperature": 0.0, "num_draft_tokens": 0}
    with pytest.raises(RequestError, match="the context holds 120"):
        chat.runtime.chat([SYSTEM, *exchanges(9)], **options)
    made = chat.runtime.chat([SYSTEM, *exchanges(9)], **options, max_tokens=5, context_policy="slide")
    assert made.token_ids == Chat(chat.runtime, exchanges(9)).slide(max_tokens=5).token_ids


# Figures


def test_what_is_prefilled_behind_a_slide_is_counted_as_such(chat: Chat) -> None:
    stats = chat.slide(num_draft_tokens=0).stats
    lengths = [len(stretch) for stretch in chat.by_fresh_generations(1000)]
    starts = [0, lengths[0], lengths[0] + lengths[1]]
    left = sum(lengths)
    num_prompts = sum(len(chat.kept(num, left - num)) + num for num in starts)
    assert stats.num_prefilled_tokens + stats.num_reused_tokens == num_prompts
    assert 0 < stats.num_reused_tokens < stats.num_prefilled_tokens  # what stands before the first turn
    assert stats.num_verify_steps == sum(lengths) - 3
    assert stats.num_prompt_tokens == len(chat.prompt())


def test_a_seed_makes_slides_repeatable(chat: Chat) -> None:
    options: dict[str, Any] = {"temperature": 1.0, "num_draft_tokens": 3}
    made = [chat.slide(**options, seed=seed) for seed in (3, 3, 4)]
    assert made[0].token_ids == made[1].token_ids != made[2].token_ids
    assert made[0].stats.num_slides == 2


def test_the_lookup_knows_what_was_kept_alone(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    stretches, begun = chat.by_fresh_generations(1000), list[list[int]]()
    token_ids, starts = joined(stretches), [0, len(stretches[0]), len(stretches[0]) + len(stretches[1])]
    monkeypatch.setattr("runtime.drafting.PromptLookup.__init__", recording(begun))
    assert chat.slide().token_ids == token_ids
    kept = [chat.kept(start, len(token_ids) - start) for start in starts]
    assert [ids for ids in begun if ids] == [
        [*prompt, *token_ids[: start + 1]] for prompt, start in zip(kept, starts, strict=True)
    ]


def recording(begun: list[list[int]]) -> Callable[..., None]:
    original = PromptLookup.__init__

    def init(self: PromptLookup, token_ids: Any = ()) -> None:
        begun.append(list(token_ids))
        original(self, token_ids)

    return init


# Faults while a slide is prefilled


def first_forward_behind_a_slide(chat: Chat) -> int:
    num_chunks = -(-len(chat.prompt()) // PROFILE.prefill_chunk_tokens)
    return num_chunks + CONTEXT - len(chat.prompt())  # the last token before it needs no forward of its own


@pytest.mark.parametrize("chunk", [0, 1, 3])
@pytest.mark.parametrize("end", ["runtime.cancel", "cancel", "close", "runtime.close"])
def test_ended_while_a_slide_is_prefilled(  # 70, 72
    chat: Chat, load: Load, plain: list[int], end: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (first, *_), num_prompt = chat.by_fresh_generations(1000), len(chat.prompt())
    forget(chat.runtime)
    stream = chat.runtime.stream(chat.prompt(), temperature=0.0, num_draft_tokens=0, context_policy="slide")
    ends = {"runtime.cancel": chat.runtime.cancel, "runtime.close": chat.runtime.close}
    number = first_forward_behind_a_slide(chat) + chunk
    hooked(chat.runtime._loaded.target, "forward", number, ends.get(end) or getattr(stream, end), monkeypatch)
    made = stream.finish()
    assert (made.token_ids, made.finish_reason, made.context_full) == (first, "cancelled", False)
    assert made.stats.num_prefilled_tokens == num_prompt
    monkeypatch.undo()
    runtime = load() if end == "runtime.close" else chat.runtime
    assert greedy(runtime).token_ids == plain


def test_a_target_that_fails_while_a_slide_is_prefilled(
    chat: Chat, plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:  # 64
    def fail() -> None:
        raise InferenceError("onnxruntime failed")

    number = first_forward_behind_a_slide(chat) + 1
    hooked(chat.runtime._loaded.target, "forward", number, fail, monkeypatch)
    with pytest.raises(InferenceError, match="onnxruntime failed"):
        chat.slide(num_draft_tokens=0)
    monkeypatch.undo()
    assert greedy(chat.runtime).token_ids == plain


def test_a_drafter_that_fails_is_left_out_behind_slides(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:  # 58
    def fail() -> None:
        raise InferenceError("onnxruntime failed")

    hooked(chat.runtime._loaded.drafter, "draft", 2, fail, monkeypatch)
    made = chat.slide(num_draft_tokens=3)
    monkeypatch.undo()
    assert made.token_ids == chat.slide(num_draft_tokens=0).token_ids
    assert (made.stats.num_drafter_faults, made.stats.num_slides) == (1, 2)
