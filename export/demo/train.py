"""Trains the demo pair from nothing, on a CPU: `python -m export.demo.train OUT`.

OUT/target and OUT/assistant become Hugging Face directories, OUT/held_out.json the prompts of the report.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, Gemma4AssistantForCausalLM, Gemma4ForCausalLM

from export.demo import corpus
from export.demo.continuations import continuations
from export.demo.evaluate import MODES, Acceptance, measure_modes
from export.demo.prompts import Prompt, held_out_prompts, load_prompts, save_prompts
from export.demo.save import NUM_DRAFT_TOKENS, save_assistant, save_target
from export.demo.tokenizer import train_tokenizer
from export.demo.train_drafter import train_drafter
from export.demo.train_target import VOCAB_SIZE, bits_per_byte, token_stream, train_target

TARGET_STEPS = 3600
DRAFTER_STEPS = 800
NUM_OWN_ROWS = 768
NUM_PROMPTS = 24
NUM_FIRST_ROUNDS = 240
FIRST_ROUND_TOKENS = 5  # the prefill's token, three drafts, and the one that every verify step adds
SEED = 0


def make_target(out: Path) -> None:
    """Trains tokenizer and target and writes them to `out/target`."""
    tokenizer = train_tokenizer(corpus.texts(held_out=False), VOCAB_SIZE)
    stream = token_stream(tokenizer, corpus.documents(held_out=False), SEED)
    save_target(train_target(stream, TARGET_STEPS, SEED), tokenizer, out / "target")


def copy_target(source: Path, out: Path) -> None:
    """Writes an already trained target, with the `tokenizer.json` beside it, to `out/target`."""
    tokenizer = Tokenizer.from_file(str(source / "tokenizer.json"))
    save_target(Gemma4ForCausalLM.from_pretrained(source), tokenizer, out / "target")


def make_drafter(out: Path) -> None:
    """Trains a drafter for `out/target`, as rounded to bf16, and writes it to `out/assistant`."""
    target = load_target(out)
    tokenizer = Tokenizer.from_file(str(out / "target" / "tokenizer.json"))
    stream = token_stream(tokenizer, corpus.documents(held_out=False), SEED)
    own_rows = continuations(target, stream, NUM_OWN_ROWS, SEED)
    save_assistant(train_drafter(target, stream, own_rows, DRAFTER_STEPS, SEED), out / "assistant")


def load_target(out: Path) -> Gemma4ForCausalLM:
    """The saved target, its bf16 weights in fp32 arithmetic."""
    return Gemma4ForCausalLM.from_pretrained(out / "target", dtype=torch.float32).eval()


def load_drafter(out: Path) -> Gemma4AssistantForCausalLM:
    """The saved drafter, its bf16 weights in fp32 arithmetic."""
    return Gemma4AssistantForCausalLM.from_pretrained(out / "assistant", dtype=torch.float32).eval()


def report(out: Path) -> list[str]:
    """What the saved pair reaches on held-out text, one line a measurement."""
    target, drafter = load_target(out), load_drafter(out)
    tokenizer = AutoTokenizer.from_pretrained(out / "target")

    def measured(prompts: list[Prompt], max_new_tokens: int) -> dict[str, Acceptance]:
        ids = [tokenizer(p.text)["input_ids"] for p in prompts]
        return measure_modes(target, drafter, ids, NUM_DRAFT_TOKENS, max_new_tokens)

    bits = bits_per_byte(target, tokenizer.backend_tokenizer, corpus.texts(held_out=True))
    prompts = load_prompts(out / "held_out.json")
    code = measured([p for p in prompts if p.kind == "code"], 96)
    chat = measured([p for p in prompts if p.kind == "chat"], 96)
    first = measured(held_out_prompts(NUM_FIRST_ROUNDS, SEED), FIRST_ROUND_TOKENS)
    lines = [f"target: {bits:.3f} bits a byte on held-out files"]
    for mode in MODES:
        both = Acceptance(code[mode].rounds + chat[mode].rounds)
        lines += [f"{mode}: {both}", f"  code: {code[mode]}", f"  chat: {chat[mode]}"]
        lines += [f"  first round after {NUM_FIRST_ROUNDS} real texts: {first[mode].first_rounds()}"]
    return lines


def main() -> None:
    """Runs the stages that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m export.demo.train", description=__doc__)
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--target", type=Path, help="an already trained target: only the drafter is trained")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.target:
        copy_target(arguments.target, arguments.out)
    else:
        make_target(arguments.out)
    make_drafter(arguments.out)
    save_prompts(held_out_prompts(NUM_PROMPTS, SEED), arguments.out / "held_out.json")
    print("\n".join(report(arguments.out)))


if __name__ == "__main__":
    main()
