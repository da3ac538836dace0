"""How long a context the memory budget leaves room for: plans anonymous memory, which the system cannot take back.

A native artifact's weights are read where they are mapped and take none; a portable one's are packed at load.
"""

import os

from profiles import MAX_DRAFT_TOKENS, DeviceProfile
from runtime.errors import MemoryBudgetError
from runtime.kv_cache import full_bytes_per_token, sliding_bytes
from runtime.kv_rows import choose_kv_dtype
from runtime.manifest import Manifest
from runtime.model_config import ModelConfig

FLOAT_BYTES = 4
LEAST_TOKENS = 512  # of a context
IDLE_BYTES = 48 << 20  # interpreter, libraries and graphs of an idle runtime (measured 32 MiB with 2 threads)
# a tokenizer in memory, relative to its compact file (measured 7.5, while it loads up to 13)
TOKENIZER_FACTOR = 13
# Beside a block's codes onnxruntime packs its float16 scale as float32 and keeps sums and a widened copy: measured.
PACKED_SCALE_BYTES = 12
FLOAT_WEIGHTS_FACTOR = 1.6  # where the manifest describes no blocks: of the data files, as measured in blocks of 32
# portable attention: scores, their masks and what the arena keeps of shorter ones (measured on E2B, 2,000 and 6,000
# tokens)
SCORE_COPIES = 6
# of runtime/native/src/attention_op.cpp and kernels.hpp; of the threads, each with scratch of its own, 16 count
TILE_QUERIES, SMALL_TILE_QUERIES, TILES_AT_ONCE, SHARING_TILES, WAVE_STATES = 8, 4, 4, 16, 256
SEGMENT_KEYS, COUNTED_THREADS = 128, 16


def context_that_fits(manifest: Manifest, profile: DeviceProfile, budget_bytes: int) -> int:
    """Tokens of context within the budget, the profile's cap and the model's own limit.

    Raises:
        MemoryBudgetError: not even `LEAST_TOKENS` fit.
    """
    wanted = min(profile.context_tokens, manifest.model.context_tokens)
    least = min(wanted, LEAST_TOKENS)
    needed = planned_bytes(manifest, profile, least)
    if needed > budget_bytes:
        raise MemoryBudgetError(
            f"{profile.name}: the model needs {_mib(needed)} for {least:,} tokens of context, the budget is "
            f"{_mib(budget_bytes)}; raise memory_budget or export with fewer bits"
        )
    left = budget_bytes - planned_bytes(manifest, profile, 0)
    return min(wanted, left // _bytes_per_token(manifest, profile))


def planned_bytes(manifest: Manifest, profile: DeviceProfile, context_tokens: int) -> int:
    """An upper estimate of anonymous memory with a full context: what is loaded, one chunk's activations, KV rows."""
    model, num_new = manifest.model, max_new_tokens(profile)
    tokenizer = TOKENIZER_FACTOR * manifest.files["tokenizer.json"].size_bytes
    loaded = IDLE_BYTES + tokenizer + _packed_bytes(manifest)
    working = activation_bytes(manifest, num_new) + sliding_bytes(
        model, choose_kv_dtype(profile, manifest.layout), num_new
    )
    return loaded + working + context_tokens * _bytes_per_token(manifest, profile)


def max_new_tokens(profile: DeviceProfile) -> int:
    """The most tokens one forward appends: a chunk of a prompt, or drafts behind the last token."""
    return max(profile.prefill_chunk_tokens, MAX_DRAFT_TOKENS + 1)


def activation_bytes(manifest: Manifest, num_tokens: int) -> int:
    """An upper estimate of one forward's activations, without portable attention scores."""
    model, is_native = manifest.model, manifest.layout == "native"
    widest = max(layer.intermediate_size for layer in model.layers)
    ple = len(model.layers) * model.ple_size
    # gate, up and their product are one op in the native layout; the PLE rows are looked up, projected, normed, added
    values = num_tokens * ((2 if is_native else 4) * widest + 4 * ple + 8 * model.hidden_size)
    logits = (1 if is_native else 2) * (MAX_DRAFT_TOKENS + 1) * model.vocab_size
    return FLOAT_BYTES * (values + logits) + (_scratch_bytes(model, num_tokens) if is_native else 0)


def _bytes_per_token(manifest: Manifest, profile: DeviceProfile) -> int:
    """Bytes that each token of context adds: KV rows, portable attention scores."""
    model = manifest.model
    rows = full_bytes_per_token(model, choose_kv_dtype(profile, manifest.layout))
    if manifest.layout == "native":
        return rows
    return rows + FLOAT_BYTES * max_new_tokens(profile) * (SCORE_COPIES * model.num_heads + 2)


def _packed_bytes(manifest: Manifest) -> int:
    """Weights that onnxruntime copies to the heap."""
    if manifest.layout == "native":
        return 0
    if manifest.matrices:
        return sum(
            matrix.padded_rows * matrix.num_blocks * (matrix.block_bytes + PACKED_SCALE_BYTES)
            for matrix in manifest.matrices
        )
    names = ("decoder.onnx.data", "drafter.onnx.data", manifest.token_table.file)
    sizes = (manifest.files[name].size_bytes for name in names if name in manifest.files)
    return int(FLOAT_WEIGHTS_FACTOR * sum(sizes))


def _scratch_bytes(model: ModelConfig, num_tokens: int) -> int:
    """What the native ops keep: a chunk's activations in int8, its queries, partial sums of attention."""
    num_threads = min(os.cpu_count() or 1, COUNTED_THREADS)
    head_dim = max(layer.head_dim for layer in model.layers)
    widest = max(model.hidden_size, model.num_heads * head_dim, *(layer.intermediate_size for layer in model.layers))
    quantized = num_tokens * (widest + 2 * FLOAT_BYTES * -(-widest // 32))  # a scale and a sum a block
    rows = max(layer.num_kv_heads * _tile_rows(model.num_heads // layer.num_kv_heads) for layer in model.layers)
    queries = FLOAT_BYTES * num_tokens * rows * head_dim
    state = FLOAT_BYTES * TILE_QUERIES * (head_dim + 2)
    shared = (SHARING_TILES + WAVE_STATES) * state
    scores = FLOAT_BYTES * TILE_QUERIES * (SEGMENT_KEYS + TILE_QUERIES)
    return quantized + queries + shared + num_threads * ((TILES_AT_ONCE + 1) * state + scores)


def _tile_rows(num_queries: int) -> int:
    """Rows kept for the queries of one token that share a KV head."""
    return SMALL_TILE_QUERIES if num_queries <= SMALL_TILE_QUERIES else -(-num_queries // TILE_QUERIES) * TILE_QUERIES


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):,.0f} MiB"
