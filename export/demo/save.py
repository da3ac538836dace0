"""Writes the demo pair as Hugging Face directories, in the form of the released Gemma 4 checkpoints."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, processors
from transformers import (
    Gemma4AssistantForCausalLM,
    Gemma4ForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from export.demo.train_target import CONTEXT_TOKENS

CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"
NUM_DRAFT_TOKENS = 3
EOS_TOKEN_IDS = [1, 5]  # <eos>, <turn|>


def hub_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers loads it: puts `<bos>` in front, knows the chat template."""
    wrapped = Tokenizer.from_str(tokenizer.to_str())
    bos = ("<bos>", tokenizer.token_to_id("<bos>"))
    wrapped.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A $B", special_tokens=[bos])
    hub = PreTrainedTokenizerFast(
        tokenizer_object=wrapped,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
    )
    hub.chat_template = CHAT_TEMPLATE.read_text(encoding="utf-8")
    return hub


def save_target(target: Gemma4ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Weights in bf16, configuration, tokenizer, chat template and sampling defaults."""
    rounded = copy.deepcopy(target).to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=64,
        top_p=0.95,
        bos_token_id=2,
        eos_token_id=EOS_TOKEN_IDS,
        pad_token_id=0,
    )
    rounded.save_pretrained(folder)
    hub_tokenizer(tokenizer).save_pretrained(folder)
    _rewrite_config(folder)


def save_assistant(drafter: Gemma4AssistantForCausalLM, folder: Path) -> None:
    """Weights in bf16, configuration, and the number of tokens to draft."""
    rounded = copy.deepcopy(drafter).to(torch.bfloat16)
    rounded.generation_config = GenerationConfig(
        num_assistant_tokens=NUM_DRAFT_TOKENS,
        num_assistant_tokens_schedule="constant",
        bos_token_id=2,
        eos_token_id=EOS_TOKEN_IDS,
        pad_token_id=0,
    )
    rounded.save_pretrained(folder)
    _rewrite_config(folder)


def _rewrite_config(folder: Path) -> None:
    """Gives the full layers' head size as `global_head_dim`, as released checkpoints and older transformers do."""
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    text_config: dict[str, Any] = config.get("text_config", config)
    overrides = text_config.pop("per_layer_config", {})
    if overrides:
        (text_config["global_head_dim"],) = {layer["head_dim"] for layer in overrides.values()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
