"""What one forward must at least read and compute, from the artifact's own sizes; the rooflines divide by it."""

from dataclasses import dataclass

from runtime.manifest import Manifest
from runtime.model_config import ModelConfig
from runtime.panels import SCALE_BYTES

DECODER_WEIGHTS = "decoder.onnx.data"


@dataclass(frozen=True, slots=True)
class Workload:
    """Bytes and operations of the target's forwards. Operations are those of products with weight matrices."""

    model: ModelConfig
    weight_bytes: int

    @classmethod
    def of(cls, manifest: Manifest) -> "Workload":
        """Every stored weight is read once: the decoder's, and the token table, which is the output projection."""
        names = (DECODER_WEIGHTS, manifest.token_table.file)
        return cls(manifest.model, sum(manifest.files[name].size_bytes for name in names))

    @classmethod
    def of_sizes(cls, model: ModelConfig, bits: int, block_size: int) -> "Workload":
        """As an export would store them: a float16 scale a block, PLE projections with 8 bits at least."""
        ple = len(model.layers) * 3 * model.ple_size * model.hidden_size
        layers = sum(layer_weights(model, index) for index in range(len(model.layers)))
        rest = layers - ple + model.vocab_size * model.hidden_size
        return cls(model, int(_stored(rest, bits, block_size) + _stored(ple, max(bits, 8), block_size)))

    def kv_bytes(self, context_tokens: int, element_bytes: int) -> int:
        """Bytes of the rows that one more token sees, each counted once however many layers read it."""
        total = 0
        for index in self.model.owned_layers:
            layer = self.model.layers[index]
            rows = context_tokens if layer.kind == "full" else min(context_tokens, self.model.sliding_window)
            total += 2 * layer.num_kv_heads * layer.head_dim * rows
        return total * element_bytes

    def operations(self, num_tokens: int, num_kept: int) -> int:
        """Multiplications and additions where layers that share KV and the logits run for `num_kept` tokens alone."""
        num_owned = self.model.num_owned_layers
        layers = [layer_weights(self.model, index) for index in range(len(self.model.layers))]
        head = self.model.vocab_size * self.model.hidden_size
        return 2 * (num_tokens * sum(layers[:num_owned]) + num_kept * (sum(layers[num_owned:]) + head))


def _stored(num_weights: int, bits: int, block_size: int) -> float:
    return num_weights * (bits / 8 if bits >= 16 else bits / 8 + SCALE_BYTES / block_size)


def layer_weights(model: ModelConfig, index: int) -> int:
    """Weights of one layer's matrices, its part of the PLE projection included."""
    layer, size = model.layers[index], model.hidden_size
    attention = 2 * model.num_heads * layer.head_dim * size
    if layer.kv_source == index:
        attention += 2 * layer.num_kv_heads * layer.head_dim * size
    return attention + 3 * layer.intermediate_size * size + 3 * model.ple_size * size


@dataclass(frozen=True, slots=True)
class Limits:
    """What this machine reached in the same run."""

    bytes_per_second: float
    operations_per_second: float

    def seconds(self, num_bytes: float, num_operations: float) -> float:
        """The least time for both, were they done side by side."""
        return max(num_bytes / self.bytes_per_second, num_operations / self.operations_per_second)
