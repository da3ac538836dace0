"""A small tokenizer in Gemma 4's manner: BPE over `▁`-spaces with byte fallback and turn tokens."""

import json
from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SPECIAL_TOKENS = [
    *("<pad>", "<eos>", "<bos>", "<unk>", "<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>"),
    *("<|tool>", "<tool|>", "<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>'),
]
ALPHABET_SIZE = 120
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
PIECES = Regex(r"▁?[A-Za-z_]+|[0-9]|\n▁*|▁+|[^A-Za-z_0-9▁\n]+")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A trained tokenizer of exactly `vocab_size` tokens; ids 0, 1, 2 are pad, eos, bos as in Gemma."""
    texts = list(texts)
    alphabet = frequent_characters(texts, ALPHABET_SIZE)
    draft = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    _add_stages(draft)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS + BYTE_TOKENS,
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),  # left to itself, the trainer breaks ties of rare characters at random
        show_progress=False,
    )
    draft.train_from_iterator(texts, trainer)
    return _without_special_bytes(draft)


def frequent_characters(texts: Iterable[str], count: int) -> list[str]:
    """The most frequent characters, spaces as `▁`; equally frequent ones by code point."""
    counts = Counter(character for text in texts for character in text.replace(" ", "▁"))
    return sorted(counts, key=lambda character: (-counts[character], character))[:count]


def _without_special_bytes(draft: Tokenizer) -> Tokenizer:
    """Byte tokens had to be special while training; in the result they are ordinary fallback tokens."""
    model = json.loads(draft.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    bpe = models.BPE(vocab=model["vocab"], merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    _add_stages(tokenizer)
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return tokenizer


def _add_stages(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(PIECES, "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
