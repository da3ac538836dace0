from pathlib import Path

from export.demo import corpus
from export.demo.prompts import MAX_CHARS, MIN_CHARS, Prompt, held_out_prompts, load_prompts, save_prompts


def test_prompts_are_half_code_half_chat_of_the_promised_length() -> None:
    prompts = held_out_prompts(8, seed=1)
    assert [p.kind for p in prompts] == ["code"] * 4 + ["chat"] * 4
    assert all(MIN_CHARS <= len(p.text) <= MAX_CHARS for p in prompts)
    assert all(p.text.endswith("<|turn>model\n") for p in prompts[4:])


def test_no_bundled_prompt_occurs_in_a_training_document() -> None:
    trained_on = "\0".join(corpus.documents(held_out=False))
    assert not [p for p in load_prompts() if p.text in trained_on]


def test_saved_prompts_load_as_they_were(tmp_path: Path) -> None:
    prompts = [Prompt("def f():\n    'é🎉'", "code"), Prompt("<|turn>user\nhi<turn|>\n<|turn>model\n", "chat")]
    save_prompts(prompts, tmp_path / "held_out.json")
    assert load_prompts(tmp_path / "held_out.json") == prompts
