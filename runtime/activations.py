"""Activations of one forward: the most of them that is alive at once, from the shapes of the native graph's steps.

A step's inputs are alive until the last step that reads them. `tests/runtime/test_activations.py` holds this to what
ONNX Runtime reports of the emitted graphs.
"""

from collections.abc import Iterator

from runtime.model_config import LayerConfig, ModelConfig

FLOAT_BYTES = 4
# of runtime/native/src/attention_op.cpp and kernels.hpp; of the threads, each with scratch of its own, 16 count
TILE_QUERIES, SMALL_TILE_QUERIES, TILES_AT_ONCE, SHARING_TILES, WAVE_STATES = 8, 4, 4, 16, 256
SEGMENT_KEYS = 128
QUANTIZED_BLOCK = 32  # activations that share a scale, the fewest


def forward_bytes(model: ModelConfig, num_tokens: int, num_kept: int) -> int:
    """The most that a forward's inputs and intermediate results take, without its outputs and the ops' scratch.

    Args:
        num_tokens: tokens of the forward
        num_kept: the last of them, for which layers that share KV and the logits are computed
    """
    num_owned, size = model.num_owned_layers, model.ple_size
    owned, shared = num_owned * size, (len(model.layers) - num_owned) * size
    inputs = num_tokens * (model.hidden_size + len(model.layers) * size)
    kept = num_kept * (model.hidden_size + len(model.layers) * size + shared) if shared else 0
    projecting = kept + 3 * num_tokens * owned  # looked-up rows, their context part, and the sum of both
    peaks = [projecting, num_tokens * owned + kept + 3 * num_kept * shared]
    for index, layer in enumerate(model.layers):
        tokens = num_tokens if index < num_owned else num_kept
        ple = num_tokens * max(0, num_owned - index) * size + num_kept * min(shared, (len(model.layers) - index) * size)
        peaks.append(ple + tokens * (_rotations(model) + max(_layer_peaks(model, layer, owns_kv=index < num_owned))))
    return FLOAT_BYTES * (inputs + max(peaks))


def _rotations(model: ModelConfig) -> int:
    """Values of cos and sin a token, of each attention kind."""
    return sum({layer.kind: layer.head_dim for layer in model.layers}.values())


def _layer_peaks(model: ModelConfig, layer: LayerConfig, *, owns_kv: bool) -> Iterator[int]:
    """Values a token that are alive in each of a layer's steps, beside rotations and PLE."""
    size, attended = model.hidden_size, model.num_heads * layer.head_dim
    projected = attended + (2 * layer.num_kv_heads * layer.head_dim if owns_kv else 0)
    yield 2 * size + projected  # normed input, residual, product
    yield size + projected + attended
    yield size + attended + size
    yield 4 * size  # product and residual become the next normed input and residual
    yield 2 * size + layer.intermediate_size
    yield 2 * size + layer.intermediate_size  # product of down beside its input and the residual


def scratch_bytes(model: ModelConfig, num_tokens: int, num_threads: int) -> int:
    """What the native ops keep: a chunk's activations in int8, its queries, partial sums of attention."""
    head_dim = max(layer.head_dim for layer in model.layers)
    owned = model.layers[: model.num_owned_layers]  # of the others few tokens are computed
    widest = max(model.hidden_size, model.num_heads * head_dim, *(layer.intermediate_size for layer in owned))
    quantized = num_tokens * (widest + 2 * FLOAT_BYTES * -(-widest // QUANTIZED_BLOCK))  # a scale and a sum a block
    rows = max(layer.num_kv_heads * _tile_rows(model.num_heads // layer.num_kv_heads) for layer in model.layers)
    queries = FLOAT_BYTES * num_tokens * rows * head_dim
    state = FLOAT_BYTES * TILE_QUERIES * (head_dim + 2)
    shared = (SHARING_TILES + WAVE_STATES) * state
    scores = FLOAT_BYTES * TILE_QUERIES * (SEGMENT_KEYS + TILE_QUERIES)
    return quantized + queries + shared + num_threads * ((TILES_AT_ONCE + 1) * state + scores)


def _tile_rows(num_queries: int) -> int:
    """Rows kept for the queries of one token that share a KV head."""
    return SMALL_TILE_QUERIES if num_queries <= SMALL_TILE_QUERIES else -(-num_queries // TILE_QUERIES) * TILE_QUERIES
