"""What an export of a configuration will hold, known before there are weights: a manifest of sizes without digests.

`tests/export/test_expected.py` holds it to what exports write.
"""

from collections.abc import Iterator
from typing import NamedTuple

from quant.blockwise import BlockFormat
from quant.recipe import Recipe, WeightFormat
from runtime.layout import DECODER, DECODER_DATA, DRAFTER, DRAFTER_DATA, Layout
from runtime.manifest import FORMAT_VERSION, TOKENIZER, FileEntry, Manifest
from runtime.matrix_spec import ALIGNMENT, MatrixSpec, TableSpec
from runtime.model_config import DrafterConfig, LayerConfig, ModelConfig, StackConfig

TOKEN_TABLE, PLE_TABLE = "token_table.bin", "ple_table.bin"
INDICES = WeightFormat(bits=64, block_size=0)
NODE_BYTES = 200  # of a native graph's file for each of its nodes, names and constants included
NODES_OF_A_LAYER = 17
TOKEN_BYTES = 44  # of a compact tokenizer file for each token, its merges included; as the demo's, filled up, has them


class _Stored(NamedTuple):
    num_rows: int
    width: int
    form: WeightFormat


def expected_manifest(
    model: ModelConfig, drafter: DrafterConfig | None, recipe: Recipe, layout: Layout, *, tokenizer_bytes: int | None
) -> Manifest:
    """The manifest of an export, for planning alone: digests, sources and sampling defaults are empty.

    Args:
        tokenizer_bytes: of the compact tokenizer file; None for an estimate from the vocabulary
    """
    files: dict[str, int] = {TOKENIZER: tokenizer_bytes or TOKEN_BYTES * model.vocab_size}
    matrices: list[MatrixSpec] = []
    num_layers = len(model.layers)
    token_table = _Stored(model.vocab_size, model.hidden_size, recipe.token_table)
    ple_table = _Stored(model.vocab_size, num_layers * model.ple_size, recipe.ple_table)
    files[TOKEN_TABLE] = _lay_out(TOKEN_TABLE, [token_table], matrices)
    files[PLE_TABLE] = _lay_out(PLE_TABLE, [ple_table], [])
    files[DECODER_DATA] = _lay_out(DECODER_DATA, _decoder(model, recipe), matrices)
    files[DECODER] = NODE_BYTES * NODES_OF_A_LAYER * num_layers
    if drafter is not None:
        files[DRAFTER_DATA] = _lay_out(DRAFTER_DATA, _drafter(drafter, recipe.drafter), matrices)
        files[DRAFTER] = NODE_BYTES * NODES_OF_A_LAYER * len(drafter.layers)
    return Manifest(
        format_version=FORMAT_VERSION,
        layout=layout,
        producer="",
        model=model,
        drafter=drafter,
        token_table=_table(TOKEN_TABLE, token_table, layout),
        ple_table=_table(PLE_TABLE, ple_table, "portable"),
        matrices=tuple(matrices) if recipe.allows_native else (),
        recipe=recipe.to_json(),
        sources={},
        generation={},
        files={name: FileEntry(size, "") for name, size in files.items()},
    )


def _decoder(model: ModelConfig, recipe: Recipe) -> Iterator[_Stored]:
    """The target's matrices but the token table."""
    size, ple_size, num_owned = model.hidden_size, model.ple_size, model.num_owned_layers
    num_shared = len(model.layers) - num_owned
    for num_layers in (num_owned, num_shared):
        if num_layers:
            yield _Stored(num_layers * ple_size, size, recipe.ple_projections)
    for index, layer in enumerate(model.layers):
        yield from _layer(model, layer, recipe.matrices, owns_kv=layer.kv_source == index)
        yield _Stored(ple_size, size, recipe.ple_projections)
        yield _Stored(size, ple_size, recipe.ple_projections)


def _drafter(drafter: DrafterConfig, form: WeightFormat) -> Iterator[_Stored]:
    """The drafter's matrices."""
    size, backbone = drafter.hidden_size, drafter.backbone_hidden_size
    yield _Stored(size, 2 * backbone, form)
    for layer in drafter.layers:
        yield from _layer(drafter, layer, form, owns_kv=False)
    yield _Stored(backbone, size, form)
    if drafter.num_centroids:
        yield _Stored(drafter.num_centroids, size, form)
        yield _Stored(drafter.vocab_size, 1, INDICES)
    yield _Stored(drafter.vocab_size, size, form)


def _layer(stack: StackConfig, layer: LayerConfig, form: WeightFormat, *, owns_kv: bool) -> Iterator[_Stored]:
    size, num_heads = stack.hidden_size, stack.num_heads
    yield _Stored((num_heads + (2 * layer.num_kv_heads if owns_kv else 0)) * layer.head_dim, size, form)
    yield _Stored(size, num_heads * layer.head_dim, form)
    yield _Stored(2 * layer.intermediate_size, size, form)
    yield _Stored(size, layer.intermediate_size, form)


def _lay_out(file: str, stored: Iterator[_Stored] | list[_Stored], matrices: list[MatrixSpec]) -> int:
    """Places arrays one behind the other, adds the quantized ones to `matrices`, and returns the file's size."""
    end = 0
    for num_rows, width, form in stored:
        offset = _aligned(end)
        if not form.is_quantized:
            end = offset + num_rows * width * form.bits // 8
            continue
        blocks = BlockFormat(width, form.bits, form.block_size)
        matrices.append(MatrixSpec(file, offset, num_rows, blocks.num_blocks, blocks.block_bytes))
        end = offset + matrices[-1].num_bytes
    return end


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _table(file: str, table: _Stored, layout: Layout) -> TableSpec:
    form = table.form
    is_native = layout == "native" and form.is_quantized
    used: Layout = "native" if is_native else "portable"
    return TableSpec(file, table.num_rows, table.width, form.bits, form.block_size, used, 1.0)
