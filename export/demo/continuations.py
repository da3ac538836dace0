"""Text the target writes itself, the half of the drafter's training data that matches what is drafted in use."""

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import Gemma4ForCausalLM

from export.demo.train_target import windows

NUM_PROMPT_TOKENS = 64
ROW_TOKENS = 256
SEGMENT_TOKENS = 64
TOP_K = 64


def continuations(target: Gemma4ForCausalLM, stream: np.ndarray, num_rows: int, seed: int) -> Tensor:
    """Rows `[num_rows, 256]`: `<eos>`, 63 tokens of the stream, 192 of the target's, greedy or sampled by segment."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    batches = []
    for start in tqdm(range(0, num_rows, 96), desc="continuations", mininterval=5):
        prompts = windows(stream, min(96, num_rows - start), NUM_PROMPT_TOKENS, rng)
        batches.append(_continued(target, prompts, ROW_TOKENS - NUM_PROMPT_TOKENS))
    rows = torch.cat(batches)
    rows[:, 0] = 1  # rows are joined into long ones: a boundary in between is `<eos>`
    return rows


@torch.no_grad()
def _continued(target: Gemma4ForCausalLM, prompts: Tensor, num_tokens: int) -> Tensor:
    """The prompts with `num_tokens` more; each segment of a row is greedy or sampled by the toss of a coin."""
    rows, inputs, cache = [prompts], prompts, None
    for step in range(num_tokens):
        if step % SEGMENT_TOKENS == 0:
            is_greedy = torch.rand(len(prompts)) < 0.5
        outputs = target(inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = outputs.past_key_values
        best = outputs.logits[:, -1].topk(TOP_K)
        rank = torch.multinomial(best.values.softmax(-1), 1).masked_fill(is_greedy[:, None], 0)
        inputs = best.indices.gather(1, rank)
        rows.append(inputs)
    return torch.cat(rows, dim=1)
