"""A generation as a stream of text: where it ends, what it emits, and that it ends whatever happens to it.

Target and drafter are scripted, so that every token, and how many come in one step, is known.
"""

import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models

from runtime.drafter import Draft
from runtime.errors import BusyError, ClosedError, InferenceError, RequestError
from runtime.generation import Request
from runtime.prefix import Reuse
from runtime.response import ResponseScanner
from runtime.sampling import SamplingParams
from runtime.stream import Generation, GenerationRun, GenerationStream
from runtime.target import Forward
from runtime.tokenizer import Tokenizer

EOS, BOS = 1, 2
WORDS = ["a", "b", "END", "EN", "D", "▁", "é", "<s>"]
TOKENS = ["<pad>", "<eos>", "<bos>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
VOCAB_SIZE = len(TOKENS)
PROMPT = [BOS, TOKENS.index("a"), TOKENS.index("b")]
DRAFT_LENGTHS = range(9)


def ids(*tokens: str | bytes) -> list[int]:
    """Ids of tokens by name; bytes are their byte tokens."""
    return [
        id_
        for token in tokens
        for id_ in (
            [TOKENS.index(f"<0x{byte:02X}>") for byte in token] if isinstance(token, bytes) else [TOKENS.index(token)]
        )
    ]


def make_tokenizer() -> Tokenizer:
    raw = tokenizers.Tokenizer(
        models.BPE(vocab={token: id_ for id_, token in enumerate(TOKENS)}, merges=[], byte_fallback=True)
    )
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    raw.add_special_tokens(TOKENS[:3])
    return Tokenizer(raw, BOS)


class Script:
    """A target whose continuation is known, its drafter, and the host of the generation.

    `before` is called with the name and number of each call: "prefill", "draft", "verify".
    """

    def __init__(self, continuation: Sequence[int], wrong_every: int = 0) -> None:
        self.continuation = continuation
        self.run_options = None
        self.cached: list[int] = []
        self.lock = threading.Lock()
        self.calls: list[str] = []
        self.before: Callable[[str, int], None] = lambda name, number: None
        self._wrong_every = wrong_every

    # host

    def claim(self, run: GenerationRun) -> tuple["Script", "Script"]:
        self.run = run
        return self, self

    def release(self, run: GenerationRun) -> None:
        assert run is self.run

    @contextmanager
    def step(self) -> Iterator[None]:
        with self.lock:
            yield

    # target

    def forward(self, token_ids: Sequence[int], num_kept: int) -> Forward:
        self._note("verify" if self.cached else "prefill")
        self.cached += token_ids
        first = len(self.cached) - num_kept + 1 - len(PROMPT)
        logits = np.zeros((num_kept, VOCAB_SIZE), np.float32)
        for row in range(num_kept):
            logits[row, self._token(first + row)] = 9.0
        return Forward(logits, np.zeros((num_kept, 4), np.float32))

    def trim(self, num_tokens: int) -> None:
        del self.cached[len(self.cached) - num_tokens :]

    def reuse(self, token_ids: Sequence[int]) -> Reuse:
        self.cached.clear()
        return Reuse(0, 0)

    def clear(self) -> None:
        self.cached.clear()

    # drafter

    def draft(
        self, last_token_id: int, hidden: object, num_draft_tokens: int, params: SamplingParams, rng: object
    ) -> list[Draft]:
        self._note("draft")
        first = len(self.cached) + 1 - len(PROMPT)
        return [Draft(self._draft(first + index), None) for index in range(num_draft_tokens)]

    def _draft(self, index: int) -> int:
        is_wrong = self._wrong_every and index % self._wrong_every == 0
        return 0 if is_wrong else self._token(index)

    def _token(self, index: int) -> int:
        return self.continuation[index] if index < len(self.continuation) else TOKENS.index("b")

    def _note(self, name: str) -> None:
        self.calls.append(name)
        self.before(name, self.calls.count(name))


TOKENIZER = make_tokenizer()


def stream(
    script: Script, *, num_drafts: int = 3, max_tokens: int = 40, stop: Sequence[str] = (), chunk: int = 64
) -> GenerationStream:
    request = Request(PROMPT, max_tokens, SamplingParams(temperature=0.0), num_drafts, chunk)
    run = GenerationRun(script, request, np.random.default_rng(0), frozenset([EOS]), ResponseScanner(TOKENIZER, stop))  # type: ignore[arg-type]
    return GenerationStream(run)


def generation_of(made: GenerationStream) -> Generation:
    generation = made.generation
    assert generation is not None
    return generation


# Where a generation ends

ENDS: dict[str, tuple[list[int], list[str], str, int]] = {  # continuation, stop strings, text, tokens generated
    "eos-first": (ids("<eos>", "a"), [], "", 1),
    "eos-behind-text": (ids("a", "b", "<eos>", "a", "a"), [], "ab", 3),
    "eos-behind-bytes": (ids("a", b"\xc3", "<eos>", b"\xa9"), [], "a\ufffd", 3),
    "stop-first": (ids("END", "a"), ["END"], "", 1),
    "stop-in-a-token": (ids("a", "END", "b"), ["N"], "aE", 2),
    "stop-over-two-tokens": (ids("a", "EN", "D", "b", "b"), ["END"], "a", 3),
    "stop-over-three-tokens": (ids("a", "b", "EN", "D", "b"), ["bEND"], "a", 4),
    "stop-ends-in-a-token": (ids("a", "EN", "END", "b"), ["NE"], "aE", 3),
    "stop-begun-only": (ids("a", "EN", "a", "<eos>"), ["END"], "aENa", 4),
    "stop-begun-at-the-end": (ids("a", "EN", "<eos>"), ["END"], "aEN", 3),
    "stop-with-spaces": (ids("a", "▁", "b", "▁", "a"), ["b "], "a ", 4),
    "stop-of-one-character-in-bytes": (ids("a", "é".encode(), "b"), ["é"], "a", 3),
    "stop-over-bytes-and-token": (ids("a", "😀".encode(), "END", "b"), ["😀E"], "a", 6),
    "stop-behind-broken-bytes": (ids("a", b"\xe2\x82", "END", "b"), ["\ufffdE"], "a", 4),
    "the-first-of-two-stops": (ids("a", "END", "b"), ["D", "EN"], "a", 2),
    "the-longer-of-two-stops": (ids("b", "a", "END", "b"), ["END", "aEND"], "b", 3),
    "stop-and-eos": (ids("a", "END", "<eos>"), ["END"], "a", 2),
    "special-token-is-no-text": (ids("a", "<pad>", "b", "<eos>"), ["ab"], "", 3),
}


@pytest.mark.parametrize("num_drafts", DRAFT_LENGTHS)
@pytest.mark.parametrize("case", ENDS)
def test_the_end_may_lie_inside_an_accepted_block(case: str, num_drafts: int) -> None:  # 67
    continuation, stop, text, num_tokens = ENDS[case]
    for wrong_every in (0, 2, 3):
        made = stream(Script(continuation, wrong_every), num_drafts=num_drafts, stop=stop)
        pieces = list(made)
        generation = generation_of(made)
        assert generation.text == "".join(pieces) == text
        assert generation.token_ids == continuation[:num_tokens]
        assert generation.finish_reason == "stop"
        assert generation.stats.num_generated_tokens == num_tokens
        assert all(pieces)


def test_every_step_is_one_accepted_block() -> None:
    """The cases above do end inside blocks: eight drafts stand at once."""
    script = Script(ids(*"abababab"))
    generation = stream(script, num_drafts=8, max_tokens=10).finish()
    assert generation.stats.accepted_histogram == (0, 0, 0, 0, 0, 0, 0, 0, 1)
    assert script.calls == ["prefill", "draft", "verify"]


@pytest.mark.parametrize("num_drafts", DRAFT_LENGTHS)
@pytest.mark.parametrize("max_tokens", range(1, 12))
def test_drafts_never_count_toward_max_tokens(num_drafts: int, max_tokens: int) -> None:  # 68
    continuation = ids(*"abbaabbabaab")
    for wrong_every in (0, 1, 3):
        generation = stream(Script(continuation, wrong_every), num_drafts=num_drafts, max_tokens=max_tokens).finish()
        assert generation.token_ids == continuation[:max_tokens]
        assert generation.finish_reason == "length"
        assert generation.stats.num_generated_tokens == max_tokens


def test_a_character_that_stays_unfinished() -> None:
    generation = stream(Script(ids("a", "€".encode()[:2])), max_tokens=3).finish()
    assert (generation.text, generation.finish_reason) == ("a\ufffd", "length")


def test_text_is_held_back_until_it_is_certain() -> None:
    made = stream(Script(ids("a", "EN", "b", b"\xc3", b"\xa9", "<eos>")), num_drafts=0, stop=["ENDED"])
    assert list(made) == ["a", "ENb", "é"]


# What a fault of the drafter does


def failing(script: Script, name: str, number: int, error: BaseException) -> None:
    def fail(called: str, count: int) -> None:
        if (called, count) == (name, number):
            raise error

    script.before = fail


def test_a_drafter_that_fails_is_counted_and_left_out() -> None:  # 58
    continuation = ids(*"abbaabbabaabbbaabab")
    script = Script(continuation)
    failing(script, "draft", 2, InferenceError("drafter"))
    generation = stream(script, max_tokens=len(continuation)).finish()
    assert generation.token_ids == continuation
    assert generation.finish_reason == "length"
    assert generation.stats.num_drafter_faults == 1
    assert script.calls.count("draft") == 2


@pytest.mark.parametrize(
    ("name", "number", "error"),
    [
        ("prefill", 1, InferenceError("target")),
        ("verify", 1, InferenceError("target")),
        ("verify", 3, RuntimeError("bug")),
        ("draft", 2, RuntimeError("bug")),
        ("draft", 2, KeyboardInterrupt()),
        ("verify", 2, KeyboardInterrupt()),
    ],
)
def test_a_step_that_fails_ends_the_generation(name: str, number: int, error: BaseException) -> None:  # 70
    script = Script(ids(*"abbaabbabaabbbaabab"))
    failing(script, name, number, error)
    made = stream(script)
    with pytest.raises(type(error)):
        list(made)
    assert not script.run.is_in_use
    assert not script.lock.locked()
    assert list(made) == []
    assert generation_of(made).finish_reason == "cancelled"


# Cancelling


@pytest.mark.parametrize(
    ("name", "number", "chunk", "num_tokens"),
    [
        ("prefill", 1, 64, 1),  # a step that was begun is finished
        ("draft", 1, 64, 1),
        ("verify", 1, 64, 5),
        ("draft", 3, 64, 9),
        ("verify", 3, 64, 13),
    ],
)
@pytest.mark.parametrize("terminates", [False, True])
def test_cancelled_within_a_step(name: str, number: int, chunk: int, num_tokens: int, terminates: bool) -> None:  # 70
    script = Script(ids(*"abbaabbabaabbbaabab"))

    def cancel(called: str, count: int) -> None:
        if (called, count) == (name, number):
            script.run.cancel()
            if terminates:  # as a forward does that onnxruntime was told to end
                raise InferenceError("terminated")

    script.before = cancel
    generation = stream(script, chunk=chunk).finish()
    assert generation.finish_reason == "cancelled"
    if terminates and name != "draft":
        num_tokens = max(num_tokens - 4, 0)  # the step that was ended yields nothing
    assert generation.token_ids == ids(*"abbaabbabaabbbaabab")[:num_tokens]
    assert generation.stats.num_drafter_faults == 0
    assert not script.run.is_in_use


@pytest.mark.parametrize("num_pieces", [0, 1, 3])
def test_cancelled_between_pieces(num_pieces: int) -> None:  # 70
    made = stream(Script(ids(*"abbaabbabaabbbaabab")), num_drafts=0)
    pieces = [next(made) for _ in range(num_pieces)]
    made.cancel()
    made.cancel()
    assert list(made) == []
    generation = generation_of(made)
    assert (generation.text, generation.finish_reason) == ("".join(pieces), "cancelled")
    assert len(generation.token_ids) == num_pieces


@pytest.mark.parametrize("num_pieces", [1, 3])
def test_closed_between_pieces(num_pieces: int) -> None:  # 70, 72
    script = Script(ids(*"abbaabbabaabbbaabab"))
    with stream(script, num_drafts=0) as made:
        for _ in range(num_pieces):
            next(made)
    made.close()
    assert len(script.calls) == num_pieces
    assert made.finish().finish_reason == "cancelled"
    assert len(made.finish().token_ids) == num_pieces
    assert not script.run.is_in_use


def test_closed_before_it_began() -> None:  # 72
    script = Script(ids("a"))
    made = stream(script)
    assert made.generation is None
    made.close()
    assert script.calls == []
    with pytest.raises(ClosedError, match="the stream was closed before it began"):
        made.finish()


def test_dropped_between_pieces() -> None:  # 70
    script = Script(ids(*"abbaabbabaabbbaabab"))
    gc.disable()  # reference counts must do
    try:
        made = stream(script, num_drafts=0)
        next(made)
        run = script.run
        del made, script.run
        assert run.generation is not None
    finally:
        gc.enable()
    assert (run.generation.text, run.generation.finish_reason) == ("a", "cancelled")


def test_a_consumer_that_raises() -> None:  # 70
    script = Script(ids(*"abbaabbabaabbbaabab"))
    with pytest.raises(ZeroDivisionError):
        for _ in stream(script, num_drafts=0):
            raise ZeroDivisionError
    assert generation_of_run(script).finish_reason == "cancelled"


def generation_of_run(script: Script) -> Generation:
    assert script.run.generation is not None
    return script.run.generation


# Threads


def blocked_in(script: Script, name: str, number: int) -> tuple[threading.Event, threading.Event]:
    """(is set once the call has begun, lets it go on)"""
    begun, go_on = threading.Event(), threading.Event()

    def block(called: str, count: int) -> None:
        if (called, count) == (name, number):
            begun.set()
            assert go_on.wait(60)

    script.before = block
    return begun, go_on


def test_two_threads_on_one_stream() -> None:  # 71
    script = Script(ids(*"abbaabbabaabbbaabab"))
    begun, go_on = blocked_in(script, "verify", 2)
    made = stream(script, num_drafts=0, max_tokens=10)
    generations: list[Generation] = []
    thread = threading.Thread(target=lambda: generations.append(made.finish()))
    thread.start()
    assert begun.wait(60)
    with pytest.raises(BusyError, match=r"another thread draws on this stream; wait for it or cancel\(\) it"):
        next(made)
    go_on.set()
    thread.join(60)
    assert [generation.token_ids for generation in generations] == [ids(*"abbaabbaba")]


@pytest.mark.parametrize("end", ["cancel", "close"])
@pytest.mark.parametrize("name", ["prefill", "draft", "verify"])
def test_ended_by_another_thread(end: str, name: str) -> None:  # 70, 72
    script = Script(ids(*"abbaabbabaabbbaabab"))
    begun, go_on = blocked_in(script, name, 1)
    made = stream(script)
    thread = threading.Thread(target=made.finish)
    thread.start()
    assert begun.wait(60)
    getattr(made, end)()
    go_on.set()
    thread.join(60)
    assert not thread.is_alive()
    assert generation_of(made).finish_reason == "cancelled"
    assert not script.run.is_in_use


# Requests


@pytest.mark.parametrize("stop", ["END", None, 5, [""], [None], [b"x"], {"a"}])
def test_stop_strings_that_are_none(stop: Sequence[str]) -> None:
    with pytest.raises(RequestError, match="^stop"):
        stream(Script([]), stop=stop)
