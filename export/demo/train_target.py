"""Trains the demo's target: a Gemma 4 text model of 3 M parameters with every kind of layer E2B has.

Source: Muon for the matrices inside layers (Jordan et al., 2024, as `torch.optim.Muon`), AdamW for tables and norms.
"""

import math
from collections.abc import Iterator

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Gemma4ForCausalLM, Gemma4TextConfig

VOCAB_SIZE = 2048
CONTEXT_TOKENS = 1024
LAYER_SCALAR = 0.9
WARMUP_STEPS = 50


def target_config() -> Gemma4TextConfig:
    """Gemma 4 E2B in small: 3:1 sliding to full, half of the layers KV-shared and double wide, PLE, softcap."""
    return Gemma4TextConfig(
        vocab_size=VOCAB_SIZE,
        vocab_size_per_layer_input=VOCAB_SIZE,
        hidden_size=192,
        hidden_size_per_layer_input=32,
        intermediate_size=192,
        use_double_wide_mlp=True,
        num_hidden_layers=8,
        num_kv_shared_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        global_head_dim=64,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2,
        sliding_window=64,
        max_position_embeddings=CONTEXT_TOKENS,
        final_logit_softcapping=30.0,
        eos_token_id=[1, 5],
    )


def token_stream(tokenizer: Tokenizer, documents: list[str], seed: int) -> np.ndarray:
    """All documents in a shuffled order as one int64 stream, `<eos>` after each."""
    order = np.random.default_rng(seed).permutation(len(documents))
    encoded = tokenizer.encode_batch([documents[i] for i in order], add_special_tokens=False)
    return np.concatenate([np.array([*e.ids, 1], np.int64) for e in encoded])


def windows(stream: np.ndarray, batch_size: int, num_tokens: int, rng: np.random.Generator) -> Tensor:
    """Random windows [batch_size, num_tokens], each behind a `<bos>`."""
    starts = rng.integers(0, len(stream) - num_tokens, batch_size)
    rows = np.stack([stream[s : s + num_tokens] for s in starts])
    rows[:, 0] = 2
    return torch.from_numpy(rows)


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Linear warm-up, flat, then linear down to zero over the last 60 %."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (num_steps - step) / (0.6 * num_steps))


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for two-dimensional weights inside layers, AdamW for tables, projections at the edge, and norms."""
    inner: list[nn.Parameter] = []
    outer: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        is_matrix = weight.ndim == 2 and ".layers." in name
        (inner if is_matrix else outer).append(weight)
    return [
        torch.optim.Muon(inner, lr=6e-3, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, lr=4e-3, betas=(0.9, 0.98), weight_decay=0.01),
    ]


def schedule(num_steps: int) -> Iterator[tuple[int, int, float]]:
    """(batch size, window, learning-rate factor) of each step; the last tenth sees long windows."""
    for step in range(num_steps):
        batch_size, num_tokens = (2, CONTEXT_TOKENS) if step >= 0.9 * num_steps else (8, 256)
        yield batch_size, num_tokens, learning_rate_factor(step, num_steps)


def train_target(stream: np.ndarray, num_steps: int, seed: int) -> Gemma4ForCausalLM:
    """A target trained on `stream` in fp32."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = Gemma4ForCausalLM(target_config()).float().train()
    for layer in model.model.layers:
        layer.layer_scalar.fill_(LAYER_SCALAR)
    chain = optimizers(model)
    base_rates = [opt.param_groups[0]["lr"] for opt in chain]
    bar = tqdm(schedule(num_steps), total=num_steps, desc="target", mininterval=5)
    for batch_size, num_tokens, factor in bar:
        rows = windows(stream, batch_size, num_tokens, rng)
        logits = model(rows[:, :-1], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, rate in zip(chain, base_rates, strict=True):
            opt.param_groups[0]["lr"] = rate * factor
            opt.step()
            opt.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def bits_per_byte(model: Gemma4ForCausalLM, tokenizer: Tokenizer, texts: list[str], num_tokens: int = 512) -> float:
    """Cross entropy on whole texts, in bits for each UTF-8 byte."""
    nats, num_bytes = 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        for start in range(0, len(ids), num_tokens):
            chunk = ids[start : start + num_tokens]
            rows = torch.tensor([[2, *chunk]])
            logits = model(rows[:, :-1], use_cache=False).logits[0]
            nats += nn.functional.cross_entropy(logits, rows[0, 1:], reduction="sum").item()
        num_bytes += len(text.encode())
    return nats / math.log(2) / num_bytes
