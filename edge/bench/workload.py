"""What one forward must at least read and compute, from the artifact's own sizes; the rooflines divide by it."""

from dataclasses import dataclass

from runtime.manifest import Manifest
from runtime.model_config import ModelConfig

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

    def operations(self, num_tokens: int, num_kept: int) -> int:
        """Multiplications and additions where layers that share KV and the logits run for `num_kept` tokens alone."""
        num_owned = self.model.num_owned_layers
        layers = [layer_weights(self.model, index) for index in range(len(self.model.layers))]
        head = self.model.vocab_size * self.model.hidden_size
        return 2 * (num_tokens * sum(layers[:num_owned]) + num_kept * (sum(layers[num_owned:]) + head))


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
