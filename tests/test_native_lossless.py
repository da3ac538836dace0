"""On the native path drafting changes nothing, to the bit: a token's results depend on the tokens up to it alone.

Not on how many go through with it, how a prompt was cut, which rows the KV cache keeps them in, or how many threads.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from edge import Runtime
from export.source import DEMO_FOLDER
from profiles import MAX_DRAFT_TOKENS, load_profile
from runtime.draft_policy import StepCosts
from runtime.generation import Drafter
from tests.drafting import CHEAP_DRAFTS, Decoding, KeepsARejectedRow, RecordingTarget, ScriptedDrafter, decode
from tests.layouts import needs_native
from tests.models import TinyModels, open_models

PAIRS = [(*pair, "float16") for pair in (("wide", 4), ("narrow", 4), ("irregular", 4), ("one_shared", 8), ("demo", 4))]
PAIRS += [("irregular", 4, "int8"), ("demo", 4, "int8"), ("wide", 4, "float32")]
NUM_TEXT = 320  # tokens: many windows, and more than the 256 that one segment of attention holds
NUM_TOKENS = 72  # of a generation
LENGTHS = range(1, MAX_DRAFT_TOKENS + 1)
CHUNKS = (24, 64, 129, NUM_TEXT)

Float32 = npt.NDArray[np.float32]
Artifact = Callable[[str, int], Path]
pytestmark = needs_native


@dataclass(frozen=True)
class Results:
    """Of every token of a text."""

    logits: Float32
    hidden: Float32
    top_ids: npt.NDArray[np.int64]

    def check(self, other: "Results") -> None:
        np.testing.assert_array_equal(self.logits, other.logits)
        np.testing.assert_array_equal(self.hidden, other.hidden)
        np.testing.assert_array_equal(self.top_ids, other.top_ids)


def results(models: TinyModels, token_ids: Sequence[int], width: int, num_kept: int | None = None) -> Results:
    """In forwards of `width` tokens, each of which is followed by two that are trimmed again.

    Args:
        num_kept: results of so many tokens of each forward, all of them if None
    """
    models.target.cache.clear()
    found = []
    for start in range(0, len(token_ids), width):
        chunk = token_ids[start : start + width]
        forward = models.target.forward(chunk, min(num_kept or width, len(chunk)))
        found.append([array.copy() for array in (forward.logits, forward.hidden, forward.top_ids)])
        if models.target.num_tokens + 2 <= models.target.cache.max_tokens:
            models.target.forward([1, 2], 1)
            models.target.trim(2)
    return Results(*map(np.concatenate, zip(*found, strict=True)))


@pytest.fixture(scope="module")
def artifact(tiny_artifact: Callable[..., Path], demo_artifact: Callable[..., Path]) -> Artifact:
    """artifact(name, bits): a native one of a tiny shape or of the demo pair."""

    def find(name: str, bits: int) -> Path:
        return demo_artifact(bits) if name == "demo" else tiny_artifact(name, bits, "int8", "native")

    return find


class Setup:
    """A pair's artifact, a text, and what its tokens give one by one."""

    def __init__(self, folder: Path, kv_dtype: str, models: TinyModels) -> None:
        self.folder = folder
        self.kv_dtype = kv_dtype
        self.models = models
        model = models.target.model
        self.text: list[int] = np.random.default_rng(5).integers(model.vocab_size, size=NUM_TEXT).tolist()
        self.alone = results(models, self.text, 1)
        self.prompt = self.text[: model.sliding_window * 2 // 3]
        self.plain = self.decode(None, 0, num_tokens=NUM_TOKENS + MAX_DRAFT_TOKENS)

    def opened(self, **options: int) -> TinyModels:
        """The same pair once more."""
        return open_models(self.folder, kv_dtype=self.kv_dtype, **options)

    def decode(
        self,
        drafter: Callable[[RecordingTarget], Drafter] | None,
        num_drafts: int,
        *,
        num_tokens: int = NUM_TOKENS,
        kind: type[RecordingTarget] = RecordingTarget,
        costs: StepCosts | None = None,
    ) -> Decoding:
        self.models.target.cache.clear()
        target = kind(self.models.target)
        return decode(target, drafter(target) if drafter else None, self.prompt, num_tokens, num_drafts, costs=costs)

    def scripted(
        self, num_drafts: int, wrong_at: int | None, kind: type[RecordingTarget] = RecordingTarget
    ) -> Decoding:
        def make(target: RecordingTarget) -> Drafter:
            drafter = ScriptedDrafter(target, len(self.prompt), self.plain.token_ids)
            drafter.wrong_at = wrong_at
            return drafter

        return self.decode(make, num_drafts, kind=kind)

    def check(self, drafted: Decoding) -> None:
        """Tokens and the logits that decided them are those of plain decoding."""
        assert drafted.token_ids == self.plain.token_ids[:NUM_TOKENS]
        np.testing.assert_array_equal(drafted.rows[:NUM_TOKENS], self.plain.rows[:NUM_TOKENS])


@pytest.fixture(scope="module", params=PAIRS, ids=lambda pair: "-".join(map(str, pair)))
def setup(request: pytest.FixtureRequest, artifact: Artifact) -> Iterator[Setup]:
    *pair, kv_dtype = request.param
    folder = artifact(*pair)
    with closing(open_models(folder, max_new_tokens=MAX_DRAFT_TOKENS + 1, kv_dtype=kv_dtype)) as models:
        yield Setup(folder, kv_dtype, models)


# each token on its own


def test_rows_of_a_verify_are_those_of_single_tokens(setup: Setup) -> None:
    for width in range(2, MAX_DRAFT_TOKENS + 2):
        results(setup.models, setup.text, width).check(setup.alone)


@pytest.mark.parametrize("max_new_tokens", [2, 3, 19, NUM_TEXT])
def test_rows_do_not_depend_on_where_the_cache_keeps_them(setup: Setup, max_new_tokens: int) -> None:
    """The sliding arrays are as long as a window and the new tokens: the shorter, the more often compacted."""
    with closing(setup.opened(max_tokens=NUM_TEXT, max_new_tokens=max_new_tokens)) as models:
        for width in (1, 2, 16):
            if width <= max_new_tokens:
                results(models, setup.text, width).check(setup.alone)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_rows_do_not_depend_on_how_a_prompt_is_cut(setup: Setup, chunk: int) -> None:
    with closing(setup.opened(max_new_tokens=chunk)) as models:
        results(models, setup.text, chunk).check(setup.alone)
        last = results(models, setup.text, chunk, num_kept=1)  # as a prefill does
        ends = [min(start + chunk, NUM_TEXT) - 1 for start in range(0, NUM_TEXT, chunk)]
        np.testing.assert_array_equal(last.logits, setup.alone.logits[ends])


@pytest.mark.parametrize("num_threads", [2, 3])
def test_rows_do_not_depend_on_threads(setup: Setup, num_threads: int) -> None:
    with closing(setup.opened(max_new_tokens=64, num_threads=num_threads)) as models:
        for width in (1, 4, 17, 64):
            results(models, setup.text, width).check(setup.alone)


# greedy


def test_every_draft_length_gives_the_tokens_of_none(setup: Setup) -> None:
    for num_drafts in LENGTHS:
        drafted = setup.decode(lambda _: setup.models.drafter, num_drafts)
        setup.check(drafted)
        assert drafted.counts.num_drafted > 0
        assert drafted.counts.num_drafter_faults == 0


def test_whichever_draft_is_rejected(setup: Setup) -> None:
    for num_drafts in LENGTHS:
        for wrong_at in {None, 0, num_drafts // 2, num_drafts - 1}:
            setup.check(setup.scripted(num_drafts, wrong_at))


def test_whatever_the_policy_chooses(setup: Setup) -> None:
    for num_drafts in LENGTHS:
        for drafter in (None, lambda _: setup.models.drafter):
            setup.check(setup.decode(drafter, num_drafts, costs=CHEAP_DRAFTS))


def test_a_kept_rejected_row_would_be_seen(setup: Setup) -> None:
    broken = setup.scripted(3, 1, KeepsARejectedRow)
    assert not np.array_equal(broken.rows[:NUM_TOKENS], setup.plain.rows[:NUM_TOKENS])


# the whole runtime, on a trained pair


@cache
def held_out() -> list[str]:
    texts = [prompt["text"] for prompt in json.loads((DEMO_FOLDER / "held_out.json").read_text(encoding="utf-8"))]
    return [*texts[::8], texts[0] * 2]


@pytest.mark.parametrize("bits", [4, 8])
def test_the_demo_says_the_same_however_it_drafts(demo_artifact: Callable[..., Path], bits: int) -> None:
    plain: dict[str, list[int]] = {}
    num_looked_up = 0
    for chunk, lengths in ((512, (0, None, *LENGTHS)), (33, (0, None, 3))):
        profile = replace(load_profile("laptop"), prefill_chunk_tokens=chunk)
        with Runtime.load(demo_artifact(bits), profile=profile) as runtime:
            for text, num_drafts in product(held_out(), lengths):
                made = runtime.generate(text, max_tokens=64, temperature=0.0, num_draft_tokens=num_drafts)
                assert made.token_ids == plain.setdefault(text, made.token_ids)
                assert made.stats.num_drafted > 0 or not num_drafts
                num_looked_up += made.stats.num_lookup_steps
    assert num_looked_up > 0  # the policy has credit for a first one, and the last text repeats itself
