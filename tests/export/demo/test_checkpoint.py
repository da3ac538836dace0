"""The bundled pair: loads, fits, renders chats, and drafts well enough to be worth a demo."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from export.demo.evaluate import measure_acceptance
from export.demo.prompts import BUNDLED_PROMPTS, load_prompts
from export.demo.train import load_drafter, load_target

CHECKPOINT = BUNDLED_PROMPTS.parent


@pytest.fixture(scope="module")
def pair() -> SimpleNamespace:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT / "target")
    return SimpleNamespace(target=load_target(CHECKPOINT), drafter=load_drafter(CHECKPOINT), tokenizer=tokenizer)


def test_all_files_together_stay_below_8_mb() -> None:
    assert sum(file.stat().st_size for file in CHECKPOINT.rglob("*") if file.is_file()) < 8_000_000


def test_weights_are_bfloat16_and_complete(pair: SimpleNamespace) -> None:
    for model in (pair.target, pair.drafter):
        assert all(weight.equal(weight.bfloat16().float()) for weight in model.parameters())
        assert all(weight.isfinite().all() for weight in model.parameters())
    assert pair.drafter.masked_embedding.token_ordering.sort().values.tolist() == list(range(2048))


def test_the_tokenizer_returns_text_as_it_was(pair: SimpleNamespace) -> None:
    for text in ["def f(x):\n\treturn '🎉👩‍💻 é'\n", *(p.text for p in load_prompts() if p.kind == "code")]:
        ids = pair.tokenizer(text)["input_ids"]
        assert ids[0] == 2
        assert pair.tokenizer.decode(ids, skip_special_tokens=True) == text


def test_the_chat_template_renders_turns(pair: SimpleNamespace) -> None:
    messages = [{"role": "system", "content": "Be terse."}, {"role": "user", "content": "hi"}]
    text = pair.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<bos><|turn>system\nBe terse.<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\n"


def test_both_turn_end_and_end_of_text_stop_a_generation(pair: SimpleNamespace) -> None:
    assert pair.target.generation_config.eos_token_id == [1, 5]
    assert pair.tokenizer.convert_tokens_to_ids(["<eos>", "<turn|>"]) == [1, 5]


def prompts(pair: SimpleNamespace, *, every: int) -> list[list[int]]:
    return [pair.tokenizer(p.text)["input_ids"] for p in load_prompts()[::every]]


def test_assisted_greedy_text_is_plain_greedy_text(pair: SimpleNamespace) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": False}
    for ids in prompts(pair, every=6):
        row = torch.tensor([ids])
        plain = pair.target.generate(row, **options)
        assisted = pair.target.generate(row, assistant_model=pair.drafter, **options)
        assert assisted.tolist() == plain.tolist()


@pytest.mark.parametrize(("do_sample", "floor"), [(False, 0.5), (True, 0.4)])
def test_drafts_are_accepted(pair: SimpleNamespace, do_sample: bool, floor: float) -> None:
    # README.md has the rates on all prompts; greedy with embeddings that lack their scale: 0.07
    found = measure_acceptance(pair.target, pair.drafter, prompts(pair, every=3), 3, 48, do_sample)
    assert found.rate > floor
