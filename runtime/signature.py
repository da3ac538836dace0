"""Names of the graphs' inputs and outputs: the contract between exporter and runtime.

An artifact's graphs have one of two layouts: "portable" is for stock ONNX Runtime, "native" for the ops of the `edge`
domain, which read and write the KV cache themselves.

decoder.onnx
    inputs   inputs_embeds      float32 [num_tokens, hidden_size]             token rows * sqrt(hidden_size)
             per_layer_inputs   float32 [num_tokens, num_layers * ple_size]   PLE rows * sqrt(ple_size)
             position_ids       int64   [num_tokens]
             num_kept           int64   [1]    rows, counted from the end, whose logits and hidden states are wanted
      portable only
             full_mask, sliding_mask  float32 [num_tokens, num_keys]          0 or a large negative number
             keys_L_H, values_L_H     float32 [num_keys, head_dim]            KV rows, the new ones included
      native only
             full_rows, sliding_rows  int64   [3]     first row that a token may see, end of the new rows, and the
                                                      position of the first
             keys_L_H, values_L_H     uint8   [capacity, row_bytes]           whole arrays, written in place; a row's
                                                      size tells its type, see `runtime.kv_rows`
    outputs  logits             float32 [num_kept, vocab_size]
             hidden             float32 [num_kept, hidden_size]               after the final norm
      portable only
             new_keys_L_H, new_values_L_H  float32 [1, num_tokens, head_dim]  bind them at the rows' place
      native only
             top_logits         float32 [num_kept, num_top_logits]            the largest, by (logit descending, id)
             top_ids            int64   [num_kept, num_top_logits]

drafter.onnx
    inputs   inputs_embeds      float32 [1, 2 * hidden_size]   token row * sqrt(hidden_size), then the hidden state
             position_ids       int64   [1]
             keys_L_H, values_L_H   as above, of the target's last sliding and last full layer that own KV
             full_rows, sliding_rows   native only, as above; the end is that of the rows it sees, and it sees them all
    outputs  candidate_logits   float32 [num_candidates]
             candidate_ids      int64   [num_candidates]       absent with a dense head: candidates are the vocabulary
             projected_state    float32 [1, hidden_size]       the next step's hidden state

embed.onnx
    inputs   input_ids          int64   [num_tokens]
    outputs  inputs_embeds, per_layer_inputs   as decoder.onnx takes them
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from runtime.layout import Layout
from runtime.model_config import AttentionKind, DrafterConfig, LayerConfig, ModelConfig

MAX_TOP_LOGITS = 128


class Signature(NamedTuple):
    """Last dimensions of a graph's inputs and outputs by name; 0 where it is symbolic."""

    inputs: dict[str, int]
    outputs: dict[str, int]


def decoder_signature(model: ModelConfig, layout: Layout = "portable") -> Signature:
    """Of decoder.onnx."""
    views = _kv_views({index: model.layers[index] for index in model.owned_layers}, layout)
    inputs = {
        "inputs_embeds": model.hidden_size,
        "per_layer_inputs": len(model.layers) * model.ple_size,
        "position_ids": 0,
        "num_kept": 1,
        **views,
    }
    outputs = {"logits": model.vocab_size, "hidden": model.hidden_size}
    if layout == "native":
        num_top = num_top_logits(model.vocab_size)
        return Signature(inputs | _rows_inputs(model.layers), outputs | {"top_logits": num_top, "top_ids": num_top})
    masks = {mask_name(layer.kind): 0 for layer in model.layers}
    return Signature(inputs | masks, outputs | {f"new_{name}": head_dim for name, head_dim in views.items()})


def drafter_signature(drafter: DrafterConfig, layout: Layout = "portable") -> Signature:
    """Of drafter.onnx."""
    layers = drafter.layers
    views = _kv_views({layer.kv_source: layer for layer in layers}, layout)
    inputs = {"inputs_embeds": 2 * drafter.backbone_hidden_size, "position_ids": 1, **views}
    if layout == "native":
        inputs |= _rows_inputs(layers)
    outputs = {"candidate_logits": drafter.num_candidates, "projected_state": drafter.backbone_hidden_size}
    return Signature(inputs, outputs | ({"candidate_ids": drafter.num_candidates} if drafter.num_centroids else {}))


def _kv_views(sources: Mapping[int, LayerConfig], layout: Layout) -> dict[str, int]:
    """Inputs with KV rows of the given owners; the size of a native row depends on its type."""
    return {
        name: layer.head_dim if layout == "portable" else 0
        for index, layer in sources.items()
        for name in kv_view_names(index, layer)
    }


def _rows_inputs(layers: Iterable[LayerConfig]) -> dict[str, int]:
    return {rows_name(layer.kind): 3 for layer in layers}


def num_top_logits(vocab_size: int) -> int:
    """Logits of a token that the native layout sorts out."""
    return min(MAX_TOP_LOGITS, vocab_size)


def mask_name(kind: AttentionKind) -> str:
    """Input of the portable layout with what tokens see of a kind's rows."""
    return f"{kind}_mask"


def rows_name(kind: AttentionKind) -> str:
    """Input of the native layout with the rows of a kind that tokens see."""
    return f"{kind}_rows"


def kv_view_names(index: int, layer: LayerConfig) -> list[str]:
    """Inputs with a layer's keys and values, for every KV head."""
    heads = range(layer.num_kv_heads)
    return [name for head in heads for name in (key_view_name(index, head), value_view_name(index, head))]


def key_name(layer: int, head: int) -> str:
    """Output with the new keys of one KV head."""
    return f"new_{key_view_name(layer, head)}"


def value_name(layer: int, head: int) -> str:
    """Output with the new values of one KV head."""
    return f"new_{value_view_name(layer, head)}"


def key_view_name(layer: int, head: int) -> str:
    """Input with all keys of one KV head."""
    return f"keys_{layer}_{head}"


def value_view_name(layer: int, head: int) -> str:
    """Input with all values of one KV head."""
    return f"values_{layer}_{head}"
