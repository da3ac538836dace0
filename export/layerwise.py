"""The target in transformers' own layers, one of them in memory at a time, in float32.

Texts go through layer by layer, all windows of them together, so that a model larger than memory can be computed with.
Knows nothing of quantization: whoever calls may exchange weights of a layer before it is run.

Source: transformers 5.22 `Gemma4TextModel.forward`.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Gemma4TextConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextDecoderLayer, Gemma4TextRotaryEmbedding

from export.checkpoint import Checkpoint
from export.linear import Matrix, TensorRows
from export.tables import embedding_multiplier
from runtime.model_config import ModelConfig

TOKENS_AT_ONCE = 2048  # of whole windows: bounds the activations of an MLP
MASKED = torch.finfo(torch.float32).min


@dataclass(frozen=True, slots=True)
class Stream:
    """Windows of text on their way through the layers.

    Hidden states are [num_windows, num_tokens, hidden_size]; `shared_kv` are the rows that later layers read, by kind.
    """

    token_ids: Tensor
    embeds: Tensor
    hidden: Tensor
    shared_kv: Mapping[str, tuple[Tensor, Tensor]]

    @property
    def num_tokens(self) -> int:
        """Tokens of all windows."""
        return self.token_ids.numel()


class LayerwiseTarget:
    """The layers of a checkpoint. Parameters are read when a layer is asked for, and gone with it."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, model: ModelConfig) -> None:
        text: dict[str, Any] = checkpoint.config.get("text_config", checkpoint.config)
        self.model = model
        self._checkpoint = checkpoint
        self._prefix = prefix
        self._config = Gemma4TextConfig.from_dict({k: v for k, v in text.items() if k != "quantization_config"})
        self._config._attn_implementation = "eager"
        self._rotary = Gemma4TextRotaryEmbedding(self._config)

    def start(self, token_ids: Tensor) -> Stream:
        """Windows [num_windows, num_tokens] of token ids, embedded."""
        embeds = self._looked_up("embed_tokens", token_ids, self.model.hidden_size)
        return Stream(token_ids, embeds, embeds.clone(), {})

    def layer(self, index: int, replaced: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A layer with its weights; `replaced` are other ones by their parameters' names in the layer."""
        with torch.device("meta"):
            layer = Gemma4TextDecoderLayer(self._config, index)
        given = replaced or {}
        state = {
            name: given[name] if name in given else self._parameter(f"layers.{index}.{name}", tuple(value.shape))
            for name, value in layer.state_dict().items()
        }
        layer.load_state_dict(state, assign=True)
        layer.eval().requires_grad_(False)
        return cast("nn.Module", layer)

    @torch.no_grad()
    def run(self, layer: nn.Module, index: int, stream: Stream, *, ple: Tensor | None = None) -> Stream:
        """The windows behind a layer.

        Args:
            ple: the layer's own per-layer inputs as `per_layer_inputs` gives them; computed if None
        """
        ple = self.per_layer_inputs(index, stream) if ple is None else ple
        kind = self._config.layer_types[index]
        num_windows, num_tokens = stream.token_ids.shape
        positions = torch.arange(num_tokens)[None]
        rotation = self._rotary(stream.hidden[:1], positions, kind)
        mask = self._mask(num_tokens, kind)
        step = max(1, TOKENS_AT_ONCE // num_tokens)
        hidden, kept = torch.empty_like(stream.hidden), []
        for first in range(0, num_windows, step):
            windows = slice(first, first + step)
            shared = {name: (k[windows], v[windows]) for name, (k, v) in stream.shared_kv.items()}
            hidden[windows] = layer(
                stream.hidden[windows].clone(),
                ple[windows],
                shared_kv_states=shared,
                position_embeddings=rotation,
                attention_mask=mask,
                position_ids=positions,
            )
            kept.append(shared)
        return replace(stream, hidden=hidden, shared_kv=_joined(kept))

    @torch.no_grad()
    def per_layer_inputs(self, index: int, stream: Stream) -> Tensor:
        """The PLE of one layer [num_windows, num_tokens, ple_size]: (token part + projected context) / sqrt(2)."""
        size = self.model.ple_size
        start = index * size
        token = self._looked_up("embed_tokens_per_layer", stream.token_ids, size, start)
        projection = self.rows("per_layer_model_projection", start, start + size)
        context = stream.embeds @ projection.T * self.model.hidden_size**-0.5
        context = self._normed(context, self._parameter("per_layer_projection_norm.weight", (size,)))
        ple: Tensor = (context + token) * 2.0**-0.5
        return ple

    def final_norm(self, hidden: Tensor) -> Tensor:
        """The hidden states behind the final norm."""
        return self._normed(hidden, self._parameter("norm.weight", (self.model.hidden_size,)))

    @torch.no_grad()
    def logits(self, normed: Tensor) -> Tensor:
        """Logits [num_rows, vocab_size] of normed hidden states [num_rows, hidden_size]."""
        logits = torch.empty((len(normed), self.model.vocab_size))
        first = 0
        for chunk in self._checkpoint.rows(f"{self._prefix}embed_tokens.weight", 0, self.model.vocab_size):
            logits[:, first : first + len(chunk)] = normed @ torch.from_numpy(chunk).T
            first += len(chunk)
        cap = self.model.logit_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows of one of the checkpoint's matrices."""
        return torch.from_numpy(
            np.concatenate(list(self._checkpoint.rows(f"{self._prefix}{name}.weight", start, stop)))
        )

    def _parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        full = f"{self._prefix}{name}"
        if name.endswith("layer_scalar") and full not in self._checkpoint:
            return torch.ones(1)
        if len(shape) == 1:
            return torch.from_numpy(self._checkpoint.vector(full, shape[0]))
        Matrix(name, self._checkpoint, (TensorRows(full, 0, shape[0]),), shape[1]).check()
        return self.rows(name.removesuffix(".weight"), 0, shape[0])

    def _looked_up(self, table: str, token_ids: Tensor, width: int, start: int = 0) -> Tensor:
        """Columns [start, start + width) of a table's rows, multiplied as embeddings are."""
        unique, places = torch.unique(token_ids, return_inverse=True)
        rows = self._checkpoint.single_rows(f"{self._prefix}{table}.weight", unique.tolist(), start, start + width)
        values: Tensor = torch.from_numpy(rows)[places] * embedding_multiplier(width)
        return values

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.model.rms_norm_eps) * weight

    def _mask(self, num_tokens: int, kind: str) -> Tensor:
        places = torch.arange(num_tokens)
        distance = places[:, None] - places[None]
        hidden = distance < 0
        if kind == "sliding_attention":
            hidden |= distance >= self.model.sliding_window
        return torch.zeros(1, 1, num_tokens, num_tokens).masked_fill(hidden, MASKED)


def windows_of(token_ids: list[int], bos_token_id: int, num_tokens: int) -> Iterator[list[int]]:
    """Whole windows of so many tokens, each with BOS first; one shorter window where there is not enough for one."""
    step = num_tokens - 1
    if len(token_ids) < step:
        yield [bos_token_id, *token_ids]
        return
    for start in range(0, len(token_ids) - step + 1, step):
        yield [bos_token_id, *token_ids[start : start + step]]


def _joined(batches: list[dict[str, tuple[Tensor, Tensor]]]) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (torch.cat([batch[name][0] for batch in batches]), torch.cat([batch[name][1] for batch in batches]))
        for name in batches[0]
    }
