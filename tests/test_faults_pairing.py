"""A drafter and a target that do not belong together. The numbers are those of the list of faults."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import Capture
from tests.faulty import (
    TOKENIZER,
    Change,
    Fault,
    Pair,
    config,
    copied_pair,
    edit,
    last_weight,
    only_pickles,
    tensors,
    text_config,
    write,
)

ORDERING = "masked_embedding.token_ordering"
DRAFTER_FAULTS: dict[str, Fault] = {
    # 54
    "hidden": (
        config(backbone_hidden_size=96),
        "made for a target of hidden size 96, this one has 40; pass the assist",
    ),
    "hidden-text": (config(backbone_hidden_size="x"), "backbone_hidden_size is 'x', expected an integer"),
    # 55
    "vocabulary": (text_config(vocab_size=1024), "the drafter's vocabulary is 1024, the target's 512"),
    "tokenizer-empty": (
        write(TOKENIZER, "{}"),
        "tokenizer.json: model differs from that of .*tokenizer.json; pass the",
    ),
    "tokenizer-cut": (write(TOKENIZER, '{"model"'), "assistant/tokenizer.json: not readable as JSON"),
    "tokenizer-list": (write(TOKENIZER, "[]"), "assistant/tokenizer.json: holds a list, expected an object"),
    "tokenizer-deep": (write(TOKENIZER, '{"model":' * 100_000), "assistant/tokenizer.json: not readable as JSON"),
    # 56
    "head_dim": (
        text_config(head_dim=32),
        r"drafter sliding layers have \(head_dim, KV heads\) \(32, 4\), the target's",
    ),
    "kv-heads": (
        text_config(num_key_value_heads=2),
        r"\(16, 2\), the target's \(16, 4\); pass the assistant that belon",
    ),
    "window": (text_config(sliding_window=16), "the drafter's sliding_window is 16, the target's 8"),
    "centroids": (config(use_ordered_embeddings="x"), "use_ordered_embeddings is 'x', expected true or false"),
    "is-a-target": (config(model_type="gemma4_text"), "model_type is 'gemma4_text', expected gemma4_assistant"),
    "text-config": (config(text_config=5), "text_config is not an object"),
    "size": (
        text_config(hidden_size=48),
        r"pre_projection.weight has shape \[32, 80\], expected \[48, 80\] from config",
    ),
    # 39, 41
    "pickle": (only_pickles, "assistant: only pickled weights"),
    "nan": (last_weight("post_projection.weight", math.nan), "tensor post_projection.weight holds NaN or infinity"),
}


@pytest.mark.parametrize("fault", DRAFTER_FAULTS)
def test_a_drafter_that_does_not_fit(pair: Pair, fault: str) -> None:  # 54-56
    change, match = DRAFTER_FAULTS[fault]
    change(pair.assistant)
    pair.refused(match)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("model", lambda content: content | {"model": content["model"] | {"merges": content["model"]["merges"][:-1]}}),
        ("added_tokens", lambda content: content | {"added_tokens": content["added_tokens"][:-1]}),
    ],
)
def test_a_drafter_with_another_tokenizer(pair: Pair, part: str, change: Callable[[Any], Any]) -> None:  # 55
    shutil.copyfile(pair.target / TOKENIZER, pair.assistant / TOKENIZER)
    edit(TOKENIZER, change)(pair.assistant)
    pair.refused(
        f"assistant/tokenizer.json: {part} differs from that of .*target/tokenizer.json; pass the assistant that"
    )


def test_the_target_s_tokenizer_beside_the_drafter(pair: Pair) -> None:
    shutil.copyfile(pair.target / TOKENIZER, pair.assistant / TOKENIZER)
    assert pair.export("--drafter", pair.assistant) == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (config(num_centroids=0), "num_centroids is 0, expected an integer >= 1"),
        (config(num_centroids=64), "vocab_size 1000 is not a multiple of num_centroids 64"),
        (config(num_centroids=250), r"centroids.weight has shape \[125, 32\], expected \[250, 32\] from config.json"),
        (config(centroid_intermediate_top_k=126), "centroid_intermediate_top_k 126 exceeds 125 centroids"),
        (tensors(lambda loaded: repeat_first(loaded[ORDERING])), f"{ORDERING} is no permutation of 1000 tokens"),
        (tensors(lambda loaded: loaded[ORDERING].fill_(10**15)), f"{ORDERING} is no permutation of 1000 tokens"),
        (
            tensors(lambda loaded: loaded.update({ORDERING: loaded[ORDERING].float()})),
            rf"{ORDERING} is F32 \[1000\], expected integers \[1000\]",
        ),
    ],
)
def test_centroids_that_are_none(  # 56
    tiny_checkpoint: Callable[[str], Any], tmp_path: Path, capfd: Capture, change: Change, match: str
) -> None:
    pair = copied_pair(tiny_checkpoint("narrow"), tmp_path, capfd)
    change(pair.assistant)
    pair.refused(match)


def repeat_first(ordering: Any) -> None:
    ordering[1] = ordering[0]


def test_the_other_size_s_drafter(tiny_checkpoint: Callable[[str], Any], tmp_path: Path, capfd: Capture) -> None:  # 59
    small, other = tiny_checkpoint("wide"), tiny_checkpoint("narrow")
    match = "made for a target of hidden size 96, this one has 64; pass the assistant that belongs to this model"
    Pair(small.target, other.assistant, tmp_path / "out", capfd).refused(match)
    Pair(other.assistant, small.assistant, tmp_path / "out", capfd).refused(
        "model_type is 'gemma4_assistant', expected"
    )
    Pair(small.target, small.target, tmp_path / "out", capfd).refused("expected gemma4_assistant")


def test_a_drafter_that_is_not_there(pair: Pair) -> None:  # 57
    shutil.rmtree(pair.assistant)
    pair.refused("assistant: no such folder; SOURCE is the folder")


def test_without_a_drafter_it_is_said(pair: Pair) -> None:  # 57
    assert pair.export() == 0
    printed = pair.capture.readouterr()
    assert "without drafter (pass --drafter for speed)" in printed.out
    assert printed.err == ""  # no bar where standard error is no terminal
