"""Which tensor costs how much: the KL divergence of the next token's distribution when it alone has 4 bits.

All variants of the model go through the layers together, one layer in memory at a time. A tensor's divergence in other
formats follows from its squared error there, since both are proportional for small errors.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.calibration import Calibration, calibration_of, token_windows
from export.checkpoint import Checkpoint, Float32
from export.expected import Shape, decoder_matrices, stored_bytes, tables
from export.layerwise import LayerwiseTarget, Stream
from quant.blockwise import BlockFormat, dequantize
from quant.gptq import GPTQ
from quant.mix import Option
from quant.recipe import WeightFormat
from quant.scale_search import search_rows
from quant.tiles import in_tiles, joined, squared_sums
from runtime.model_config import ModelConfig

PROBE = WeightFormat(4, 32)
FORMATS = tuple(WeightFormat(bits, block_size) for bits in (4, 8) for block_size in (32, 64, 128, 256))
MAX_TOKENS = 4096
STATE_BYTES = 1 << 30  # of hidden states of all variants together
ROWS_AT_ONCE = 256  # of logits
SAMPLE_WEIGHTS = 1 << 20
STACKED = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
}
TABLES = {"token_table": "embed_tokens", "ple_table": "embed_tokens_per_layer"}


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """A tensor: mean KL divergence in nats where it alone is stored as `PROBE`, and what other formats would cost."""

    name: str
    kl_nats: float
    options: tuple[Option, ...]

    @property
    def kl_per_megabyte(self) -> float:
        """What the probe costs for each megabyte that it saves against 8 bits in blocks as large."""
        sizes = {option.form: option.num_bytes for option in self.options}
        return self.kl_nats / ((sizes[WeightFormat(8, PROBE.block_size)] - sizes[PROBE]) / 1e6)


class RoundedCheckpoint:
    """A checkpoint one of whose tensors is rounded to the probe's format when its rows are read."""

    def __init__(self, checkpoint: Checkpoint, tensor: str) -> None:
        self._checkpoint = checkpoint
        self._tensor = tensor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)

    def __contains__(self, name: str) -> bool:
        return name in self._checkpoint

    def rows(self, name: str, start: int, stop: int) -> Iterator[Float32]:
        """As the checkpoint's own, rounded."""
        for chunk in self._checkpoint.rows(name, start, stop):
            yield rounded(chunk) if name == self._tensor else chunk

    def single_rows(self, name: str, rows: list[int], start: int, stop: int) -> Float32:
        """As the checkpoint's own, rounded; whole rows, since blocks begin at their first column."""
        if name != self._tensor:
            return self._checkpoint.single_rows(name, rows, start, stop)
        return rounded(self._checkpoint.single_rows(name, rows, 0, self._checkpoint.shape(name)[1]))[:, start:stop]


def sensitivities(
    checkpoint: Checkpoint, prefix: str, model: ModelConfig, text: Path, progress: Callable[[int], None]
) -> list[Sensitivity]:
    """Of every matrix of the target, tables first; `progress` hears of each layer.

    Raises:
        ExportError: the text cannot be used.
    """
    shapes = [*tables(model), *decoder_matrices(model)]
    num_tokens = STATE_BYTES // (4 * 3 * model.hidden_size * len(shapes))
    token_ids = token_windows(checkpoint, model, text, max(min(num_tokens, MAX_TOKENS), 1))
    run = _Run(checkpoint, prefix, model, calibration_of(checkpoint, prefix, model, text), token_ids)
    for index in range(len(model.layers)):
        run.pass_layer(index)
        progress(1)
    divergences = run.divergences()
    return [
        Sensitivity(shape.name, divergences[shape.name], _options(checkpoint, prefix, shape, divergences[shape.name]))
        for shape in shapes
    ]


class _Run:
    """The reference and all variants, on their way through the layers."""

    def __init__(
        self, checkpoint: Checkpoint, prefix: str, model: ModelConfig, moments: Calibration, token_ids: Tensor
    ) -> None:
        self._model = model
        self._moments = moments
        self._target = LayerwiseTarget(checkpoint, prefix, model)
        self._reference = self._target.start(token_ids)
        # those that see other tables or projections, and streams by the tensor that is rounded
        self._targets: dict[str, LayerwiseTarget] = {}
        self._streams: dict[str, Stream] = {}
        projections = {s.name: "per_layer_model_projection" for s in decoder_matrices(model) if _is_projection(s.name)}
        for name, tensor in (TABLES | projections).items():
            view: Any = RoundedCheckpoint(checkpoint, f"{prefix}{tensor}.weight")
            self._targets[name] = LayerwiseTarget(view, prefix, model)
            self._streams[name] = self._targets[name].start(token_ids)

    def pass_layer(self, index: int) -> None:
        """Takes all streams through a layer, and begins those of its own matrices."""
        layer = self._target.layer(index)
        ple = self._target.per_layer_inputs(index, self._reference)
        state = layer.state_dict()
        begun = {
            name: self._target.run(self._target.layer(index, state | replaced), index, self._reference, ple=ple)
            for name, replaced in self._replacements(index, state)
        }
        for name, stream in self._streams.items():
            own = self._targets[name].per_layer_inputs(index, stream) if self._sees(name, index) else ple
            self._streams[name] = self._target.run(layer, index, stream, ple=own)
        self._reference = self._target.run(layer, index, self._reference, ple=ple)
        self._streams |= begun

    def divergences(self) -> dict[str, float]:
        """Mean KL divergence of each variant from the reference, in nats."""
        sums = dict.fromkeys(self._streams, 0.0)
        reference = self._target.final_norm(self._reference.hidden).flatten(0, 1)
        normed = {name: self._target.final_norm(s.hidden).flatten(0, 1) for name, s in self._streams.items()}
        for first in range(0, len(reference), ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            expected = torch.log_softmax(self._target.logits(reference[rows]).double(), -1)
            for name, hidden in normed.items():
                target = self._targets[name] if name == "token_table" else self._target
                found = torch.log_softmax(target.logits(hidden[rows]).double(), -1)
                sums[name] += float((expected.exp() * (expected - found)).sum())
        return {name: max(total, 0.0) / len(reference) for name, total in sums.items()}

    def _sees(self, name: str, index: int) -> bool:
        """Whether a variant's per-layer inputs of a layer differ from the reference's."""
        if name not in self._targets:
            return False
        if not _is_projection(name):
            return True
        start, num_owned = int(name.rpartition(".")[2]), self._model.num_owned_layers
        return index >= start and (index < num_owned or start > 0 or num_owned == len(self._model.layers))

    def _replacements(self, index: int, state: Mapping[str, Tensor]) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The matrices of a layer with parameters `state` by name, each with the parameters that it becomes."""
        for shape in decoder_matrices(self._model):
            part = shape.name.removeprefix(f"layers.{index}.")
            if part == shape.name:
                continue
            gptq, form = GPTQ.of_moment(self._moments.moment(shape.name)), _blocks(shape.width, PROBE)
            replaced = {}
            for name in STACKED.get(part, (part,)):
                weights = state[f"{name}.weight"].numpy()
                replaced[f"{name}.weight"] = torch.from_numpy(dequantize(gptq.quantize(weights, form), form))
            yield shape.name, replaced


def rounded(weights: Float32) -> Float32:
    """Weights [num_rows, width] as the probe's format holds them."""
    form = _blocks(weights.shape[1], PROBE)
    return dequantize(joined(in_tiles(lambda rows: search_rows(weights[rows], form), weights)), form)


def _options(checkpoint: Checkpoint, prefix: str, shape: Shape, kl_nats: float) -> tuple[Option, ...]:
    """Each format with its size, and the divergence that its error stands for."""
    weights = _sample(checkpoint, prefix, shape)
    errors = {}
    for form in FORMATS:
        blocks = _blocks(shape.width, form)
        errors[form] = squared_sums(weights, search_rows(weights, blocks), blocks)[0]
    if not errors[PROBE]:
        return tuple(Option(form, stored_bytes(shape, form), 0.0) for form in FORMATS)
    return tuple(Option(f, stored_bytes(shape, f), kl_nats * errors[f] / errors[PROBE]) for f in FORMATS)


def _sample(checkpoint: Checkpoint, prefix: str, shape: Shape) -> Float32:
    """The first rows of a matrix's first tensor, enough to tell how errors of formats compare."""
    layer, _, part = shape.name.rpartition(".self_attn.")
    name = TABLES.get(shape.name, shape.name)
    if _is_projection(name):
        name = "per_layer_model_projection"
    elif layer and part == "qkv_proj":
        name = f"{layer}.self_attn.q_proj"
    name = name.replace("gate_up_proj", "gate_proj")
    full = f"{prefix}{name}.weight"
    num_rows = min(checkpoint.shape(full)[0], max(1, SAMPLE_WEIGHTS // shape.width))
    return np.concatenate(list(checkpoint.rows(full, 0, num_rows)))


def _blocks(width: int, form: WeightFormat) -> BlockFormat:
    return BlockFormat(width, form.bits, form.block_size)


def _is_projection(name: str) -> bool:
    return name.startswith("per_layer_model_projection.")
