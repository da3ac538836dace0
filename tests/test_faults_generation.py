"""Requests that cannot be served and generations that fail: a typed error, or a declared result without the drafter.

The runtime then gives the tokens of a fresh one. The numbers are those of the list of faults.
"""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge import InferenceError, ProfileError, RequestError, Runtime
from runtime.decoder import make_decoder
from runtime.drafter import DrafterModel
from runtime.manifest import read_manifest
from tests.faulty import tensors
from tests.lasting import CONTEXT, PROFILE, PROMPT, Load, greedy

VOCAB_SIZE = 1024

# Prompts and options

PROMPTS: dict[str, tuple[object, str]] = {
    # 60
    "empty-text": ("", "the prompt is empty; pass at least one token"),
    "empty-list": ([], "the prompt is empty; pass at least one token"),
    "empty-array": (np.array([], np.int64), "the prompt is empty; pass at least one token"),
    # 61
    "as-long-as-the-context": (
        [2] * CONTEXT,
        "the prompt has 120 tokens, the context holds 120 and needs room for one",
    ),
    "one-longer": ([2] * (CONTEXT + 1), "the prompt has 121 tokens, the context holds 120 .*; shorten the prompt or"),
    "ten-times": ([2] * (10 * CONTEXT), "the prompt has 1,200 tokens, the context holds 120"),
    "ten-times-text": ("a1" * 10 * CONTEXT, "the prompt has [0-9],[0-9]{3} tokens, the context holds 120"),
    # 62
    "negative": ([2, -1], "prompt token 1 is -1, expected an integer 0-1,023"),
    "vocabulary": ([2, 1024], "prompt token 1 is 1024, expected an integer 0-1,023"),
    "2^70": ([2**70], "prompt token 0 is 1180591620717411303424, expected an integer 0-1,023"),
    "10^4000": ([10**4000], r"prompt token 0 is 10+\.\.\.0+, expected an integer 0-1,023"),
    "bool": ([2, True], "prompt token 1 is True, expected an integer"),
    "float": ([2.0], "prompt token 0 is 2.0, expected an integer"),
    "nan": ([math.nan], "prompt token 0 is nan, expected an integer"),
    "float-array": (np.array([2.0, 5.0]), "prompt token 0 is 2.0, expected an integer"),
    "bool-array": (np.array([True]), "prompt token 0 is True, expected an integer"),
    "nested": ([[2, 5]], r"prompt token 0 is \[2, 5\], expected an integer"),
    "nested-array": (np.array([[2, 5]]), r"prompt token 0 is \[2, 5\], expected an integer"),
    "strings": (["a"], "prompt token 0 is 'a', expected an integer"),
    "null": ([None], "prompt token 0 is None, expected an integer"),
    "scalar-array": (np.array(5), "the prompt is 5, expected text or a list of token ids"),
    "none": (None, "the prompt is None, expected text or a list of token ids"),
    "number": (5, "the prompt is 5, expected text or a list of token ids"),
    "bytes": (b"abc", "the prompt is b'abc', expected text or a list of token ids"),
    "bytearray": (bytearray(b"abc"), "the prompt is bytearray.*, expected text or a list of token ids"),
    "object": ({2: 5}, "the prompt is {2: 5}, expected text or a list of token ids"),
    "set": ({2, 5}, "the prompt is {2, 5}, expected text or a list of token ids"),
    "endless": (iter(int, 1), r"the prompt is <callable.*\.\.\..*, expected text or a list of token ids"),
    "surrogate": ("a\ud800", "text: character 1 is a lone surrogate and no Unicode text"),
}
OPTIONS: list[tuple[str, object, str]] = [
    *(
        ("max_tokens", value, "max_tokens is .*, expected an integer >= 1") for value in (0, -1, "5", 1.5, True, [])
    ),  # 63
    *(("temperature", value, "temperature must be a finite number >= 0") for value in ("hot", -1, math.nan, math.inf)),
    *(("temperature", value, "temperature must be a finite number >= 0") for value in (True, [], 10**400, 1j)),
    *(("top_p", value, "top_p must be a number above 0 and at most 1") for value in (0, -1, 1.1, "x", math.nan, [])),
    *(("top_k", value, "top_k must be a whole number >= 0") for value in (-1, 1.5, "x", True, math.nan, [])),
    *(("seed", value, "seed is .*, expected an integer >= 0") for value in (-1, 1.5, "x", True, [])),
    *(("stop", value, "^stop") for value in ("END", None, 5, [""], [None], [b"x"], {"a"})),
    *(("num_draft_tokens", value, "num_draft_tokens is .*, expected an integer 0-16") for value in (-1, 17, "3", 1.5)),
]


@pytest.mark.parametrize("case", PROMPTS)
def test_prompts_that_cannot_be_served(runtime: Runtime, case: str) -> None:  # 60-62
    prompt, match = PROMPTS[case]
    with pytest.raises(RequestError, match=match) as caught:
        greedy(runtime, prompt)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(("name", "value", "match"), OPTIONS)
def test_options_that_cannot_be_served(runtime: Runtime, name: str, value: object, match: str) -> None:  # 63
    with pytest.raises(RequestError, match=match):
        greedy(runtime, **{name: value})


def test_the_longest_prompt_yields_one_token(runtime: Runtime) -> None:  # 61
    generation = greedy(runtime, [2] * (CONTEXT - 1))
    assert (len(generation.token_ids), generation.finish_reason) == (1, "length")


@pytest.mark.parametrize("max_tokens", [None, CONTEXT - len(PROMPT), 2**70])
def test_the_context_ends_a_generation(runtime: Runtime, max_tokens: int | None, plain: list[int]) -> None:  # 61, 63
    for num_drafts in (0, 3, 16):
        generation = greedy(runtime, max_tokens=max_tokens, num_draft_tokens=num_drafts)
        assert generation.finish_reason == "length"
        assert len(generation.token_ids) == CONTEXT - len(PROMPT)
        assert generation.token_ids[: len(plain)] == plain


@pytest.mark.parametrize("make", [tuple, np.array, lambda ids: np.array(ids, np.int32), list])
def test_token_ids_of_any_kind(runtime: Runtime, make: Callable[[list[int]], Sequence[int]], plain: list[int]) -> None:
    assert greedy(runtime, make(PROMPT)).token_ids == plain


def test_text_whose_ids_the_model_lacks(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:  # 55, 62
    monkeypatch.setattr(runtime._loaded.tokenizer, "encode", lambda text, add_bos: [2, VOCAB_SIZE])
    with pytest.raises(RequestError, match="prompt token 1 is 1024, expected an integer 0-1,023"):
        runtime.generate("text")


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_window_of_few_rows_and_many_drafts(load: Load, plain: list[int], chunk: int) -> None:  # 69
    runtime = load(prefill_chunk_tokens=chunk, num_draft_tokens=16)
    assert greedy(runtime).token_ids == greedy(runtime, num_draft_tokens=16).token_ids == plain


def test_a_profile_cannot_ask_for_more_drafts_than_an_option() -> None:
    with pytest.raises(ProfileError, match="num_draft_tokens is 17, expected an integer of 0 to 16"):
        replace(PROFILE, num_draft_tokens=17)


# Numbers that are none


def poisoned(runtime: Runtime, number: int, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """One logit of the target's forward of this number becomes `value`."""
    target, calls = runtime._loaded.target, []
    forward = target.forward

    def poison(token_ids: Sequence[int], num_kept: int) -> Any:
        calls.append(len(token_ids))
        result = forward(token_ids, num_kept)
        if len(calls) == number:
            result.logits[-1, 5] = value
            if result.top_logits is not None:  # a native graph's own ranking: of a row with NaN all is NaN
                result.top_logits[-1, 0] = value
        return result

    monkeypatch.setattr(target, "forward", poison)


@pytest.mark.parametrize("num_drafts", [0, 3])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("step", [0, 1, 4])
def test_nan_names_its_step(  # 64
    runtime: Runtime, step: int, value: float, num_drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    poisoned(runtime, step + 1, value, monkeypatch)
    with pytest.raises(
        InferenceError, match=f"step {step}: the largest of 1,024 logits in row [0-3] is {value}; the mod"
    ):
        greedy(runtime, num_draft_tokens=num_drafts)


# finite weights, but half of the hidden state becomes infinite and products with it cancel to NaN
OVERFLOWING = tensors(lambda loaded: loaded["model.norm.weight"].fill_(3e38))


@pytest.fixture
def damaged(tiny_checkpoint: Callable[[str], Any], lasting_artifact: Path, tmp_path: Path) -> Callable[..., Path]:
    """damaged(part, change): as the `lasting_artifact`, of a checkpoint with a fault that no exporter can see."""
    from export.pipeline import export_artifact, open_source
    from quant.recipe import make_recipe

    layout = read_manifest(lasting_artifact).layout

    def make(part: str, change: Callable[[Path], object]) -> Path:
        pair = tiny_checkpoint("wide")
        folders = {"target": pair.target, "assistant": pair.assistant}
        folders[part] = Path(shutil.copytree(folders[part], tmp_path / part))
        change(folders[part])
        source = open_source(folders["target"], folders["assistant"])
        recipe = make_recipe(4 if layout == "native" else 32)
        export_artifact(source, tmp_path / "artifact", recipe, layout=layout, show_progress=False)
        return tmp_path / "artifact"

    return make


def test_weights_that_overflow_are_told(damaged: Callable[..., Path], load: Load) -> None:  # 64
    runtime = load(damaged("target", OVERFLOWING))
    for _ in range(2):
        with pytest.raises(
            InferenceError, match="step 0: the largest of 1,024 logits in row 0 is nan; the model overfl"
        ):
            greedy(runtime)
    assert runtime.count_tokens("a") > 0


def test_a_drafter_of_nan_changes_nothing(damaged: Callable[..., Path], load: Load, plain: list[int]) -> None:  # 65
    runtime = load(damaged("assistant", OVERFLOWING))
    assert greedy(runtime).token_ids == plain
    for temperature in (0.0, 1.0):
        generation = greedy(runtime, temperature=temperature, seed=3, num_draft_tokens=3)
        stats = generation.stats
        assert (stats.num_drafted, stats.num_accepted) == (0, 0)
        # the last step needs no draft
        assert stats.num_drafter_faults == stats.num_verify_steps - 1 == len(plain) - 2
        if temperature == 0:
            assert generation.token_ids == plain


class FailingSession:
    """A session whose runs fail after the first `num_runs`."""

    def __init__(self, session: Any, num_runs: int) -> None:
        self.num_left = num_runs
        self._session = session

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any, options: Any) -> None:
        self.num_left -= 1
        if self.num_left < 0:
            raise RuntimeError("out of\nmemory")
        self._session.run_with_iobinding(binding, options)


@pytest.mark.parametrize("num_runs", [0, 1, 7])
def test_a_drafter_that_fails_midway(  # 58
    runtime: Runtime, num_runs: int, plain: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = runtime._loaded
    failing = FailingSession(loaded.drafter._session, num_runs)
    monkeypatch.setattr(loaded, "drafter", DrafterModel(failing, runtime.manifest.drafter, loaded.target))
    generation = greedy(runtime, num_draft_tokens=3)
    assert generation.token_ids == plain
    assert generation.finish_reason == "length"
    assert generation.stats.num_drafter_faults == 1
    assert failing.num_left == -1  # not asked again
    assert generation.stats.num_drafted == num_runs // 3 * 3
    monkeypatch.undo()
    assert greedy(runtime).stats.num_drafter_faults == 0  # the next generation drafts again


@pytest.mark.parametrize("num_runs", [0, 1, 6])
def test_a_target_that_fails_midway(runtime: Runtime, num_runs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    target = runtime._loaded.target
    failing = FailingSession(target._decoder._session, num_runs)
    monkeypatch.setattr(target, "_decoder", make_decoder(target.layout, failing, target.model, target.cache))
    with pytest.raises(InferenceError, match="^onnxruntime failed: out of$"):
        greedy(runtime)
    monkeypatch.undo()
