"""Trains the demo's drafter: Gemma 4's MTP assistant in small, unrolled exactly as generation feeds it.

All positions of a row draft at once. The burst at position t reads the target's KV rows before t and, as its input, the
embedding of token t and the target's hidden state of row t - 1; each later step gets the next token and its own state.

Source: transformers `generation/candidate_generator.py` (SinglePositionMultiTokenCandidateGenerator) and
`models/gemma4_assistant`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

from export.demo.clusters import balanced_clusters
from export.demo.train_target import CONTEXT_TOKENS, learning_rate_factor, optimizers, windows

HIDDEN_SIZE = 96
NUM_CENTROIDS = 64
TOP_CENTROIDS = 8
STEP_WEIGHTS = (1.0, 0.8, 0.6)  # a later draft counts only where the ones before it were accepted
HARD_LABEL_WEIGHT = 0.3
CENTROID_WEIGHT = 0.5
LONG_EVERY = 20  # steps; the one full layer must also meet distant rows, which cost four times as much


@dataclass(frozen=True, slots=True)
class TargetReading:
    """What the frozen target computed of rows of tokens.

    Attributes:
        embeddings: scaled token embeddings `[batch, num_tokens, hidden]`.
        hidden_states: behind the final norm `[batch, num_tokens, hidden]`.
        shared_kv: by layer type, keys and values `[batch, num_kv_heads, num_tokens, head_dim]`.
        logits: `[batch, num_tokens, vocab]`; row t scores token t + 1.
    """

    embeddings: Tensor
    hidden_states: Tensor
    shared_kv: dict[str, tuple[Tensor, Tensor]]
    logits: Tensor


def drafter_config(target: Gemma4ForCausalLM) -> Gemma4AssistantConfig:
    """Four query-only layers, 3 sliding and 1 full, over the KV of `target`, with a centroid head."""
    attentions = [layer.self_attn for layer in target.model.layers]
    head_dims = {attention.layer_type: attention.head_dim for attention in attentions}
    text_config = Gemma4TextConfig(
        vocab_size=target.config.vocab_size,
        vocab_size_per_layer_input=0,
        hidden_size=HIDDEN_SIZE,
        hidden_size_per_layer_input=0,
        intermediate_size=384,
        num_hidden_layers=4,
        num_kv_shared_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=head_dims["sliding_attention"],
        global_head_dim=head_dims["full_attention"],
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
        sliding_window=target.config.sliding_window,
        max_position_embeddings=target.config.max_position_embeddings,
        final_logit_softcapping=None,
        eos_token_id=target.config.eos_token_id,
    )
    return Gemma4AssistantConfig(
        text_config=text_config,
        backbone_hidden_size=target.config.hidden_size,
        use_ordered_embeddings=True,
        num_centroids=NUM_CENTROIDS,
        centroid_intermediate_top_k=TOP_CENTROIDS,
    )


def initial_drafter(target: Gemma4ForCausalLM, seed: int) -> Gemma4AssistantForCausalLM:
    """An untrained drafter whose output table is the target's, cut to its principal directions, and clustered."""
    torch.manual_seed(seed)
    drafter = Gemma4AssistantForCausalLM(drafter_config(target)).float().train()
    table = target.get_input_embeddings().weight.detach()
    clusters = balanced_clusters(table.numpy(), NUM_CENTROIDS, seed)
    directions = torch.linalg.svd(table, full_matrices=False).Vh[:HIDDEN_SIZE]
    output_table = table @ directions.T
    with torch.no_grad():
        drafter.lm_head.weight.copy_(output_table)
        drafter.masked_embedding.centroids.weight.copy_(output_table[clusters].mean(dim=1))
        drafter.masked_embedding.token_ordering.copy_(torch.from_numpy(clusters).flatten())
    return drafter


@torch.no_grad()
def read_target(target: Gemma4ForCausalLM, rows: Tensor) -> TargetReading:
    """One forward pass over rows `[batch, num_tokens]`."""
    outputs = target(rows, use_cache=False, output_hidden_states=True, return_shared_kv_states=True)
    embeddings = target.get_input_embeddings()(rows)
    return TargetReading(embeddings, outputs.hidden_states[-1], dict(outputs.shared_kv_states), outputs.logits)


def draft_masks(num_positions: int, num_rows: int, sliding_window: int) -> dict[str, Tensor]:
    """Additive masks `[1, 1, num_positions, num_rows]` by layer type, for bursts at positions 1, 2, ...

    A burst at position t sees the KV rows before t; in sliding layers the last `sliding_window + 1` of them.
    """
    distance = torch.arange(1, num_positions + 1)[:, None] - torch.arange(num_rows)
    is_seen = distance >= 1
    seen = {"full_attention": is_seen, "sliding_attention": is_seen & (distance <= sliding_window + 1)}
    blocked = torch.finfo(torch.float32).min
    return {kind: torch.zeros(mask.shape).masked_fill(~mask, blocked)[None, None] for kind, mask in seen.items()}


def unroll(drafter: Gemma4AssistantForCausalLM, reading: TargetReading, num_steps: int) -> Iterator[Tensor]:
    """Per draft step the drafter's hidden states `[batch, num_positions, hidden]` of bursts at positions 1, 2, ...

    Step j of the burst at t scores token t + 1 + j, so the last `num_steps` positions of a row start no burst.
    """
    num_rows = reading.embeddings.shape[1]
    num_positions = num_rows - num_steps
    masks = draft_masks(num_positions, num_rows, drafter.config.text_config.sliding_window)
    states = reading.hidden_states[:, :num_positions]
    for step in range(num_steps):
        tokens = reading.embeddings[:, 1 + step : 1 + step + num_positions]
        hidden: Tensor = drafter.model(
            inputs_embeds=drafter.pre_projection(torch.cat([tokens, states], dim=-1)),
            attention_mask=masks,
            position_ids=torch.arange(1, num_positions + 1)[None],
            shared_kv_states=reading.shared_kv,
            use_cache=False,
            output_hidden_states=True,  # else transformers 5.24 drops positions, and PLE that a drafter has not
        ).last_hidden_state
        yield hidden
        states = drafter.post_projection(hidden)


def step_loss(drafter: Gemma4AssistantForCausalLM, hidden: Tensor, target_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of one draft step, and the share of positions whose best token is the target's best.

    Cross entropy with the target's distribution, with its best token, and of the centroids with each cluster's mass.
    """
    wanted = target_logits.softmax(-1)
    best = target_logits.argmax(-1)
    scores = drafter.lm_head(hidden).log_softmax(-1)
    soft = -(wanted * scores).sum(-1).mean()
    hard = -scores.gather(-1, best[..., None]).mean()
    head = drafter.masked_embedding
    mass = wanted[..., head.token_ordering].view(*wanted.shape[:-1], head.num_centroids, -1).sum(-1)
    clusters = -(mass * head.centroids(hidden).log_softmax(-1)).sum(-1).mean()
    agreement = (scores.argmax(-1) == best).float().mean()
    return soft + HARD_LABEL_WEIGHT * hard + CENTROID_WEIGHT * clusters, agreement


def burst_loss(drafter: Gemma4AssistantForCausalLM, reading: TargetReading) -> tuple[Tensor, Tensor]:
    """Weighted loss of all draft steps, and the agreement `[num_steps]` of each."""
    num_steps = len(STEP_WEIGHTS)
    losses, agreements = [], []
    for step, hidden in enumerate(unroll(drafter, reading, num_steps)):
        logits = reading.logits[:, 1 + step : 1 + step + hidden.shape[1]]
        loss, agreement = step_loss(drafter, hidden, logits)
        losses.append(STEP_WEIGHTS[step] * loss)
        agreements.append(agreement)
    return torch.stack(losses).sum(), torch.stack(agreements)


def mixed_rows(
    stream: np.ndarray, own_rows: Tensor, batch_size: int, num_tokens: int, rng: np.random.Generator
) -> Tensor:
    """Rows `[batch_size, num_tokens]` behind a `<bos>`: half real text, half the target's own, joined where long."""
    num_own = batch_size // 2
    parts = rng.integers(0, len(own_rows), num_own * num_tokens // own_rows.shape[1])
    own = own_rows[torch.from_numpy(parts)].reshape(num_own, num_tokens)
    rows = torch.cat([windows(stream, batch_size - num_own, num_tokens, rng), own])
    rows[:, 0] = 2
    return rows


def train_drafter(
    target: Gemma4ForCausalLM, stream: np.ndarray, own_rows: Tensor, num_steps: int, seed: int
) -> Gemma4AssistantForCausalLM:
    """A drafter trained in fp32 on the stream and on the target's own text, `own_rows [num_rows, 256]`."""
    drafter = initial_drafter(target, seed)
    rng = np.random.default_rng(seed)
    chain = optimizers(drafter)
    base_rates = [opt.param_groups[0]["lr"] for opt in chain]
    bar: Any = tqdm(range(num_steps), desc="drafter", mininterval=5)
    for step in bar:
        batch_size, num_tokens = (2, CONTEXT_TOKENS) if step % LONG_EVERY == LONG_EVERY - 1 else (8, 256)
        factor = learning_rate_factor(step, num_steps)
        rows = mixed_rows(stream, own_rows, batch_size, num_tokens, rng)
        loss, agreement = burst_loss(drafter, read_target(target, rows))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        for opt, rate in zip(chain, base_rates, strict=True):
            opt.param_groups[0]["lr"] = rate * factor
            opt.step()
            opt.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}", agreement=" ".join(f"{a:.2f}" for a in agreement.tolist()))
    return drafter.eval()
