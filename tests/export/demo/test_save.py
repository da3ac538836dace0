import json
from pathlib import Path

import pytest
import torch
from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Gemma4ForCausalLM, PreTrainedTokenizerBase

from export.demo.save import hub_tokenizer, save_assistant, save_target
from export.demo.tokenizer import train_tokenizer
from export.demo.train_drafter import initial_drafter
from export.demo.train_target import target_config


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def f(x):\n    return x + 1\n"] * 5, vocab_size=300)


@pytest.fixture(scope="module")
def hub(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    return hub_tokenizer(tokenizer)


def render(hub: PreTrainedTokenizerBase, *turns: tuple[str, str], prompt: bool = True) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    text = hub.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
    assert isinstance(text, str)
    return text


def test_bos_comes_first_once(hub: PreTrainedTokenizerBase) -> None:
    assert hub("hi")["input_ids"][0] == 2
    assert hub.apply_chat_template([{"role": "user", "content": "hi"}])["input_ids"][:2] == [2, 4]


def test_a_conversation_in_turns(hub: PreTrainedTokenizerBase) -> None:
    text = render(hub, ("system", " Be terse. "), ("user", "hi\n"), ("assistant", "yes"), ("user", "why?"))
    assert text == (
        "<bos><|turn>system\nBe terse.<turn|>\n<|turn>user\nhi<turn|>\n<|turn>model\nyes<turn|>\n"
        "<|turn>user\nwhy?<turn|>\n<|turn>model\n"
    )


def test_without_a_generation_prompt(hub: PreTrainedTokenizerBase) -> None:
    assert render(hub, ("user", "hi"), prompt=False) == "<bos><|turn>user\nhi<turn|>\n"


def test_thoughts_of_earlier_turns_are_left_out(hub: PreTrainedTokenizerBase) -> None:
    answer = "<|channel>thought\nhm<channel|>\nfour <|channel>thought\nsure<channel|>indeed"
    text = render(hub, ("user", "2+2"), ("model", answer), prompt=False)
    assert text.endswith("<|turn>model\nfour indeed<turn|>\n")


@pytest.mark.parametrize("turns", [[("tool", "x")], [("user", "x"), ("system", "y")]])
def test_an_unexpected_role_is_refused(hub: PreTrainedTokenizerBase, turns: list[tuple[str, str]]) -> None:
    with pytest.raises(TemplateError, match=f"role {turns[-1][0]} at message {len(turns)}: expected user or assistant"):
        render(hub, *turns)


def test_a_saved_pair_has_the_released_form(tokenizer: Tokenizer, tmp_path: Path) -> None:
    target = Gemma4ForCausalLM(target_config())
    save_target(target, tokenizer, tmp_path / "target")
    save_assistant(initial_drafter(target, seed=0), tmp_path / "assistant")
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assistant = json.loads((tmp_path / "assistant" / "config.json").read_text())
    assert (config["head_dim"], config["global_head_dim"], config["dtype"]) == (32, 64, "bfloat16")
    assert assistant["text_config"]["global_head_dim"] == 64
    sampling = json.loads((tmp_path / "target" / "generation_config.json").read_text())
    assert (sampling["do_sample"], sampling["top_k"], sampling["top_p"]) == (True, 64, 0.95)
    assert sampling["eos_token_id"] == [1, 5]
    drafting = json.loads((tmp_path / "assistant" / "generation_config.json").read_text())
    assert (drafting["num_assistant_tokens"], drafting["num_assistant_tokens_schedule"]) == (3, "constant")


def test_a_saved_target_loads_with_its_weights_rounded(tokenizer: Tokenizer, tmp_path: Path) -> None:
    target = Gemma4ForCausalLM(target_config())
    save_target(target, tokenizer, tmp_path)
    loaded = Gemma4ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, weight in target.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.bfloat16().float()), name
    assert AutoTokenizer.from_pretrained(tmp_path)("hi")["input_ids"][0] == 2
