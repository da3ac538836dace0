"""Quantized artifacts compute what transformers computes with the same quantized weights.

Portable ones in float32 arithmetic; native ones with the input of every product rounded to int8 and KV rows to float16,
here as there.
"""

import numpy as np
import pytest
import torch
from transformers import Gemma4AssistantForCausalLM, Gemma4ForCausalLM
from transformers.models.gemma4 import modeling_gemma4

from quant.blockwise import BlockFormat, quantize_rows
from runtime.kv_rows import decode_rows
from runtime.tables import dequantize_rows
from tests.layouts import needs_native
from tests.models import draft_graph
from tests.native_reference import quantize_activations

PLE_PROJECTIONS = ("per_layer_input_gate", "per_layer_projection", "per_layer_model_projection")
PROMPT = [2, 17, 300, 301, 5, 77, 130, 444, 9, 12, 13, 14, 200, 201, 202, 203, 3, 4, 8, 11, 100, 101]


@torch.no_grad()
def round_weights(model: torch.nn.Module, bits: int, block_size: int = 32) -> None:
    """Replaces each matrix by what its quantized form stands for, as the recipe of `bits` has it."""
    for name, weight in model.named_parameters():
        if weight.ndim != 2:
            continue
        used = 8 if any(part in name for part in PLE_PROJECTIONS) else bits
        codes, scales, _ = quantize_rows(weight.numpy(), BlockFormat(weight.shape[1], used, block_size))
        weight.copy_(torch.from_numpy(dequantize_rows(codes, scales, weight.shape[1], used)))


@pytest.mark.parametrize("shape", ["wide", "irregular"])
@pytest.mark.parametrize("bits", [8, 4])
def test_target_logits(tiny_checkpoint, open_tiny, shape, bits):
    reference = Gemma4ForCausalLM.from_pretrained(tiny_checkpoint(shape).target, dtype=torch.float32).eval()
    before = reference(torch.tensor([PROMPT])).logits[0].detach().numpy()
    round_weights(reference, bits)
    expected = reference(torch.tensor([PROMPT])).logits[0].detach().numpy()
    found = open_tiny(shape, bits, "float32").target.forward(PROMPT, num_kept=len(PROMPT)).logits
    # both in float32 on an ill-conditioned random net: rounding alone moves logits by some 1e-4 of their spread
    assert np.abs(found - expected).max() <= 1e-3 * np.ptp(expected)
    assert np.abs(found - before).max() > 1e-2 * np.ptp(expected), "quantization must be visible for this to mean much"


@pytest.mark.parametrize("shape", ["wide", "irregular"])
def test_drafter_candidates(tiny_checkpoint, tiny_artifact, open_tiny, shape):
    models = open_tiny(shape, 4, "float32")
    reference = Gemma4AssistantForCausalLM.from_pretrained(tiny_checkpoint(shape).assistant, dtype=torch.float32).eval()
    round_weights(reference, bits=8)  # a drafter never has fewer
    models.target.forward(PROMPT, num_kept=1)
    state = np.random.default_rng(0).standard_normal(models.manifest.model.hidden_size).astype(np.float32)
    found = draft_graph(models, tiny_artifact(shape, 4, "float32"))(7, state)
    with torch.no_grad():
        expected = reference(
            inputs_embeds=torch.from_numpy(np.concatenate([models.target.token_table.rows([7])[0], state]))[None, None],
            position_ids=torch.tensor([[len(PROMPT)]]),
            shared_kv_states=shared_kv(models),
        )
    ids = found.get("candidate_ids", np.arange(models.manifest.model.vocab_size))
    assert_close(found["candidate_logits"], expected.logits[0, 0].numpy()[ids])
    assert_close(found["projected_state"], expected.last_hidden_state[0].numpy())


# the native layout


def round_activations(model: torch.nn.Module, block_size: int = 32) -> None:
    """Rounds the input of every product to int8 in blocks, as the native ops do."""

    def rounded(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> torch.Tensor:
        (x,) = inputs
        values, scales = quantize_activations(x.reshape(-1, x.shape[-1]).numpy(), block_size)
        padded = (values * scales[..., None]).reshape(len(values), -1)
        return torch.from_numpy(padded[:, : x.shape[-1]]).reshape(x.shape)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(rounded)


@pytest.fixture
def rounded_rows(monkeypatch):
    """Rounds the keys and values of transformers' eager attention to float16, as the native layout keeps them."""
    attend = modeling_gemma4.eager_attention_forward

    def rounded(module, query, key, value, *rest, **options):
        return attend(module, query, key.half().float(), value.half().float(), *rest, **options)

    monkeypatch.setattr(modeling_gemma4, "eager_attention_forward", rounded)


def check_but_for_flips(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Sums differ by 1e-7, which now and then rounds an activation, or a value of a row, to its other neighbour."""
    differences = np.array(
        [np.abs(mine - theirs).max() / np.ptp(theirs) for mine, theirs in zip(found, expected, strict=True)]
    )
    assert np.median(differences) < 1e-5
    assert differences.max() < 0.1


@needs_native
@pytest.mark.parametrize("shape", ["wide", "narrow", "irregular", "one_shared"])
@pytest.mark.parametrize("bits", [8, 4])
def test_native_target_logits(tiny_checkpoint, open_tiny, rounded_rows, shape, bits):
    reference = Gemma4ForCausalLM.from_pretrained(
        tiny_checkpoint(shape).target, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    round_weights(reference, bits)
    round_activations(reference)
    target = open_tiny(shape, bits, "int8", "native").target
    texts = np.random.default_rng(0).integers(target.model.vocab_size, size=(24, 3)).tolist()
    found, expected = [], []
    for text in texts:
        target.cache.clear()
        found.append(target.forward(text, num_kept=1).logits[0].copy())
        with torch.no_grad():
            expected.append(reference(torch.tensor([text])).logits[0, -1].numpy())
    check_but_for_flips(found, expected)


@needs_native
@pytest.mark.parametrize("shape", ["wide", "irregular"])
def test_native_drafter_candidates(tiny_checkpoint, tiny_artifact, open_tiny, shape):
    artifact = (shape, 4, "int8", "native")
    models = open_tiny(*artifact)
    reference = Gemma4AssistantForCausalLM.from_pretrained(tiny_checkpoint(shape).assistant, dtype=torch.float32).eval()
    round_weights(reference, bits=8)
    round_activations(reference)
    models.target.forward(PROMPT, num_kept=1)
    found, expected = [], []
    run = draft_graph(models, tiny_artifact(*artifact))
    for token_id in range(20, 44):
        state = np.random.default_rng(token_id).standard_normal(models.manifest.model.hidden_size).astype(np.float32)
        embeds = np.concatenate([models.target.token_table.rows([token_id])[0], state])
        with torch.no_grad():
            theirs = reference(
                inputs_embeds=torch.from_numpy(embeds)[None, None],
                position_ids=torch.tensor([[len(PROMPT)]]),
                shared_kv_states=shared_kv(models),
            )
        found.append(run(token_id, state)["projected_state"][0])
        expected.append(theirs.last_hidden_state[0, 0].numpy())
    check_but_for_flips(found, expected)


def assert_close(found, expected):
    assert np.abs(found - expected).max() <= 1e-4 * np.ptp(expected)


def shared_kv(models):
    """The rows that the drafter reads, as transformers passes them: by kind, [1, num_kv_heads, num_keys, head_dim]."""
    arrays = {name: array for _, name, array in models.target.cache.arrays()}
    shared = {}
    for layer in models.manifest.drafter.layers:
        rows = slice(*models.target.cache.draft_span(layer.kind)[:2])
        heads = range(layer.num_kv_heads)
        values = (
            [decode_rows(arrays[f"{part}_{layer.kv_source}_{head}"][rows], layer.head_dim) for head in heads]
            for part in ("keys", "values")
        )
        shared[f"{layer.kind}_attention"] = tuple(torch.from_numpy(np.stack(each))[None] for each in values)
    return shared
