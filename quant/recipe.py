"""Which tensors get how many bits.

Source: Gemma's quantization-aware checkpoints round to symmetric 4 bits in blocks of 32; 4-bit PLE projections double
the KL divergence for 1 % of the size, so they keep 8.
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

Activations = Literal["int8", "float32"]
BITS = (4, 8, 16, 32)
BLOCK_SIZES = (16, 32, 64, 128, 256)
NATIVE_BLOCK_SIZE = 32  # the native product takes blocks of this size and its multiples


class RecipeError(ValueError):
    """A choice of bits, block size or activations that no graph can be emitted for."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """Storage of one group of tensors; `block_size` is 0 for 16 and 32 bits."""

    bits: int
    block_size: int

    @property
    def is_quantized(self) -> bool:
        """Whether codes and scales are stored instead of floats."""
        return self.bits < 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """Formats by role of a tensor. `activations` is the type that quantized products compute in."""

    matrices: WeightFormat
    ple_projections: WeightFormat
    token_table: WeightFormat
    ple_table: WeightFormat
    drafter: WeightFormat
    activations: Activations

    @property
    def allows_native(self) -> bool:
        """Whether the native layout exists for it."""
        form = self.matrices
        return form.is_quantized and form.block_size % NATIVE_BLOCK_SIZE == 0 and self.activations == "int8"

    def to_json(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        return asdict(self)


def make_recipe(bits: int, block_size: int = 32, activations: Activations = "int8") -> Recipe:
    """The recipe behind `--bits`: everything at `bits`, but PLE projections and the drafter never below 8.

    Raises:
        RecipeError: no graph can be emitted for the choice.
    """
    if bits not in BITS:
        raise RecipeError(f"--bits {bits}: choose one of {', '.join(map(str, BITS))}")
    if block_size not in BLOCK_SIZES:
        raise RecipeError(f"--block-size {block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))}")
    if activations not in ("int8", "float32"):
        raise RecipeError(f"--activations {activations}: choose int8 or float32")

    def stored(at_least: int) -> WeightFormat:
        used = max(bits, at_least)
        return WeightFormat(used, block_size if used < 16 else 0)

    return Recipe(
        matrices=stored(4),
        ple_projections=stored(8),
        token_table=stored(4),
        ple_table=stored(4),
        drafter=stored(8),
        activations=activations,
    )
