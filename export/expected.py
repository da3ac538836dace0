"""What an export of a configuration will hold, known before there are weights: a manifest of sizes without digests.

`tests/export/test_expected.py` holds it to what exports write.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from quant.blockwise import BlockFormat
from quant.recipe import DRAFTER as DRAFTER_SCOPE
from quant.recipe import Recipe, WeightFormat
from runtime.layout import DECODER, DECODER_DATA, DRAFTER, DRAFTER_DATA, Layout
from runtime.manifest import FORMAT_VERSION, TOKENIZER, FileEntry, Manifest
from runtime.matrix_spec import ALIGNMENT, MatrixSpec, TableSpec, padded_rows
from runtime.model_config import DrafterConfig, LayerConfig, ModelConfig, StackConfig

TOKEN_TABLE, PLE_TABLE = "token_table.bin", "ple_table.bin"
INDICES = WeightFormat(bits=64, block_size=0)
NODE_BYTES = 200  # of a native graph's file for each of its nodes, names and constants included
NODES_OF_A_LAYER = 17
TOKEN_BYTES = 44  # of a compact tokenizer file for each token, its merges included; as the demo's, filled up, has them


class Shape(NamedTuple):
    """A matrix that an export stores, under the name that recipes have for it; without bits a recipe has no say."""

    name: str
    num_rows: int
    width: int
    fixed: WeightFormat | None = None


def expected_manifest(
    model: ModelConfig, drafter: DrafterConfig | None, recipe: Recipe, layout: Layout, *, tokenizer_bytes: int | None
) -> Manifest:
    """The manifest of an export, for planning alone: digests, sources and sampling defaults are empty.

    Args:
        tokenizer_bytes: of the compact tokenizer file; None for an estimate from the vocabulary
    """
    files: dict[str, int] = {TOKENIZER: tokenizer_bytes or TOKEN_BYTES * model.vocab_size}
    specs: list[MatrixSpec] = []
    token_table, ple_table = tables(model)
    files[TOKEN_TABLE] = _lay_out(TOKEN_TABLE, [token_table], recipe, specs)
    files[PLE_TABLE] = _lay_out(PLE_TABLE, [ple_table], recipe, [])
    files[DECODER_DATA] = _lay_out(DECODER_DATA, decoder_matrices(model), recipe, specs)
    files[DECODER] = NODE_BYTES * NODES_OF_A_LAYER * len(model.layers)
    if drafter is not None:
        files[DRAFTER_DATA] = _lay_out(DRAFTER_DATA, drafter_matrices(drafter), recipe, specs)
        files[DRAFTER] = NODE_BYTES * NODES_OF_A_LAYER * len(drafter.layers)
    is_convertible = recipe.allows_native(matrix.name for matrix in matrices(model, drafter))
    return Manifest(
        format_version=FORMAT_VERSION,
        layout=layout,
        producer="",
        model=model,
        drafter=drafter,
        token_table=_table(TOKEN_TABLE, token_table, recipe, layout),
        ple_table=_table(PLE_TABLE, ple_table, recipe, "portable"),
        matrices=tuple(specs) if is_convertible else (),
        recipe=recipe.to_json(),
        sources={},
        generation={},
        files={name: FileEntry(size, "") for name, size in files.items()},
    )


def matrices(model: ModelConfig, drafter: DrafterConfig | None) -> list[Shape]:
    """Every matrix that a recipe gives a format."""
    own = [*tables(model), *decoder_matrices(model)]
    return own if drafter is None else [*own, *(shape for shape in drafter_matrices(drafter) if not shape.fixed)]


def tables(model: ModelConfig) -> tuple[Shape, Shape]:
    """Token and PLE table."""
    return (
        Shape("token_table", model.vocab_size, model.hidden_size),
        Shape("ple_table", model.vocab_size, len(model.layers) * model.ple_size),
    )


def decoder_matrices(model: ModelConfig) -> Iterator[Shape]:
    """The target's matrices but the tables, in their order in the file."""
    size, ple_size, num_owned = model.hidden_size, model.ple_size, model.num_owned_layers
    for start, stop in ((0, num_owned), (num_owned, len(model.layers))):
        if stop > start:
            yield Shape(f"per_layer_model_projection.{start}", (stop - start) * ple_size, size)
    for index, layer in enumerate(model.layers):
        yield from _layer(f"layers.{index}", model, layer, owns_kv=layer.kv_source == index)
        yield Shape(f"layers.{index}.per_layer_input_gate", ple_size, size)
        yield Shape(f"layers.{index}.per_layer_projection", size, ple_size)


def drafter_matrices(drafter: DrafterConfig) -> Iterator[Shape]:
    """The drafter's matrices in their order in the file."""
    size, backbone = drafter.hidden_size, drafter.backbone_hidden_size
    yield Shape(f"{DRAFTER_SCOPE}pre_projection", size, 2 * backbone)
    for index, layer in enumerate(drafter.layers):
        yield from _layer(f"{DRAFTER_SCOPE}layers.{index}", drafter, layer, owns_kv=False)
    yield Shape(f"{DRAFTER_SCOPE}post_projection", backbone, size)
    if drafter.num_centroids:
        yield Shape(f"{DRAFTER_SCOPE}masked_embedding.centroids", drafter.num_centroids, size)
        yield Shape(f"{DRAFTER_SCOPE}token_ordering", drafter.vocab_size, 1, INDICES)
    yield Shape(f"{DRAFTER_SCOPE}embed_tokens", drafter.vocab_size, size)


def stored_bytes(shape: Shape, form: WeightFormat) -> int:
    """Bytes that a matrix takes in a format."""
    return sum(_arrays(shape, form))


def _arrays(shape: Shape, form: WeightFormat) -> list[int]:
    """Bytes of the arrays that a matrix is stored as."""
    num_weights = shape.num_rows * shape.width
    if not form.is_quantized:
        return [num_weights * form.bits // 8]
    if form.codebook == "nf4":
        return [-(-num_weights // 2), 4 * -(-num_weights // form.block_size)]
    blocks = BlockFormat(shape.width, form.bits, form.block_size)
    zero_points = [padded_rows(shape.num_rows) * blocks.zero_point_bytes] if form.zero_point else []
    return [_spec("", 0, shape, blocks).num_bytes, *zero_points]


def _layer(name: str, stack: StackConfig, layer: LayerConfig, *, owns_kv: bool) -> Iterator[Shape]:
    size, num_heads = stack.hidden_size, stack.num_heads
    heads = num_heads + (2 * layer.num_kv_heads if owns_kv else 0)
    yield Shape(f"{name}.self_attn.{'qkv' if owns_kv else 'q'}_proj", heads * layer.head_dim, size)
    yield Shape(f"{name}.self_attn.o_proj", size, num_heads * layer.head_dim)
    yield Shape(f"{name}.mlp.gate_up_proj", 2 * layer.intermediate_size, size)
    yield Shape(f"{name}.mlp.down_proj", size, layer.intermediate_size)


def _lay_out(file: str, shapes: Iterable[Shape], recipe: Recipe, specs: list[MatrixSpec]) -> int:
    """Places matrices one behind the other, adds the native ones to `specs`, and returns the file's size."""
    end = 0
    for shape in shapes:
        form = shape.fixed or recipe.choose(shape.name).form
        if form.allows_native:
            specs.append(_spec(file, _aligned(end), shape, BlockFormat(shape.width, form.bits, form.block_size)))
        for num_bytes in _arrays(shape, form):
            end = _aligned(end) + num_bytes
    return end


def _spec(file: str, offset: int, shape: Shape, blocks: BlockFormat) -> MatrixSpec:
    return MatrixSpec(file, offset, shape.num_rows, blocks.num_blocks, blocks.block_bytes)


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _table(file: str, table: Shape, recipe: Recipe, layout: Layout) -> TableSpec:
    form = recipe.choose(table.name).form
    used: Layout = layout if form.allows_native else "portable"
    return TableSpec(file, table.num_rows, table.width, form.bits, form.block_size, used, 1.0)
