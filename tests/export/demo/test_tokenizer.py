import pytest
from tokenizers import Tokenizer

from export.demo.tokenizer import SPECIAL_TOKENS, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["def f(x):\n    return x + 1\n", "class A:\n    pass\n"] * 5, vocab_size=320)


@pytest.mark.parametrize(
    "text",
    [
        "def f(x):\n    return x\n",
        "  two  spaces\tand a tab ",
        "héllo 世界 🎉👩‍💻",
        "",
        "\n\n\n",
        "▁ is the space mark"[1:],
    ],
)
def test_text_comes_back_as_it_was(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_turn_tokens_are_single_ids_and_left_out_of_plain_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|turn>user\nhi<turn|>").ids
    assert (ids[0], ids[-1]) == (4, 5)
    assert tokenizer.decode(ids) == "user\nhi"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|turn>user\nhi<turn|>"


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS] == list(range(len(SPECIAL_TOKENS)))
