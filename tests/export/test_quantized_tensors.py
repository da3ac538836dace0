"""Quantized storages, in files as the libraries themselves make them, give what the libraries dequantize to."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import torch
from bitsandbytes.functional import (
    QuantState,
    dequantize_4bit,
    dequantize_blockwise,
    int8_vectorwise_dequant,
    quantize_4bit,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, Gemma4ForCausalLM

from export.checkpoint import Checkpoint
from export.quantized_tensors import float16_scales, holds_codes, reencode
from quant.blockwise import BlockFormat, dequantize, unpack
from runtime.tables import dequantize_rows
from tests.checkpoints import SHAPES, TinyCheckpoint, make_target
from tests.quantized_files import (
    BNB,
    BNB_CONFIG,
    W,
    dequantized,
    flat_dequantized,
    packed_config,
    packed_parts,
    quantized,
    save,
    save_bnb,
    scheme,
    whole,
)

DOWN = "model.layers.0.mlp.down_proj.weight"  # [64, 96], of no whole 4-bit blocks
GATE = "model.layers.0.mlp.gate_proj.weight"  # [96, 64]
FOUR_BITS = ["nf4", "nf4-nested", "fp4"]
# float16 rounds to 2^-11, and each float32 product of the two ways there to 2^-24
ROUNDING = 2**-11 + 2**-22


@pytest.fixture(scope="module")
def bnb_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    return cache(lambda kind: Checkpoint(save_bnb(tmp_path_factory.mktemp(kind) / "target", BNB[kind])))


# bitsandbytes


@pytest.mark.parametrize("kind", BNB)
def test_the_names_are_those_of_the_unquantized_checkpoint(
    kind: str, bnb_checkpoint: Callable[[str], Checkpoint]
) -> None:
    checkpoint, model = bnb_checkpoint(kind), make_target(SHAPES["wide"])
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert {name: checkpoint.shape(name) for name in checkpoint.names()} == shapes
    assert all(checkpoint.num_elements(name) == np.prod(shape) for name, shape in shapes.items())
    assert all(name in checkpoint for name in shapes)
    stored = load_file(checkpoint.weight_files[0])
    assert not any(name in checkpoint for name in stored if name not in shapes)
    assert checkpoint.quantized("model.norm.weight") is None
    assert checkpoint.place(GATE) == f"{checkpoint.weight_files[0]}: tensor {GATE}"


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_4_bits_are_dequantized_as_by_bitsandbytes(kind: str, bnb_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = bnb_checkpoint(kind)
    tensors, num_checked = load_file(checkpoint.weight_files[0]), 0
    for name in checkpoint.names():
        if checkpoint.quantized(name) is not None:
            np.testing.assert_array_equal(whole(checkpoint, name), flat_dequantized(tensors, name))
            num_checked += 1
    assert num_checked == 81  # 10 layers of 9 but 5 without k and v, and per_layer_model_projection


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("name", [DOWN, GATE])
def test_slices_of_rows_are_rows_of_the_whole(
    kind: str, name: str, bnb_checkpoint: Callable[[str], Checkpoint]
) -> None:
    tensor = quantized(bnb_checkpoint(kind), name)
    rows = tensor.rows(0, tensor.shape[0])
    for start, stop in ((0, 1), (1, 2), (3, 50), (7, 8), (63, 64), (5, 5)):
        np.testing.assert_array_equal(tensor.rows(start, stop), rows[start:stop])


@pytest.mark.parametrize("shape", [(6, 7), (10, 33), (3, 2), (2, 64), (130, 63)])
@pytest.mark.parametrize("block_size", [32, 64])
def test_rows_that_begin_within_a_byte_or_a_block(shape: tuple[int, int], block_size: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    codes, state = quantize_4bit(torch.randn(shape), blocksize=block_size, quant_type="nf4", compress_statistics=True)
    parts = {f"{W}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    checkpoint = save(tmp_path, {W: codes} | parts, BNB_CONFIG)
    expected = flat_dequantized(load_file(tmp_path / "model.safetensors"), W)
    tensor = quantized(checkpoint)
    for start in range(shape[0]):
        np.testing.assert_array_equal(tensor.rows(start, start + 1), expected[start : start + 1])
    np.testing.assert_array_equal(tensor.rows(0, shape[0]), expected)


def test_more_scales_than_one_block_of_scales(tmp_path: Path) -> None:
    torch.manual_seed(0)
    weights = torch.randn(70, 320) * torch.rand(70, 1)  # 350 blocks, of which 256 share a scale
    codes, state = quantize_4bit(weights, blocksize=64, quant_type="nf4", compress_statistics=True)
    parts = {f"{W}.{part}": tensor for part, tensor in state.as_dict(packed=True).items()}
    tensor = quantized(save(tmp_path, {W: codes} | parts, BNB_CONFIG))
    np.testing.assert_array_equal(tensor.rows(0, 70), dequantize_4bit(codes, state).numpy())
    blocks = tensor.nf4_blocks(50, 60)
    assert blocks is not None
    scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    np.testing.assert_array_equal(blocks[1], scales[250:300].numpy())


@pytest.mark.parametrize("kind", ["nf4", "nf4-nested"])
def test_nf4_keeps_its_bytes(kind: str, bnb_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = bnb_checkpoint(kind)
    tensor, stored = quantized(checkpoint, GATE), load_file(checkpoint.weight_files[0])
    blocks = tensor.nf4_blocks(10, 96)
    assert blocks is not None
    codes, scales = blocks
    assert tensor.nf4_block_size == 64
    np.testing.assert_array_equal(codes, stored[GATE].flatten()[10 * 32 :].numpy())
    assert codes.dtype == np.uint8
    assert scales.dtype == np.float32
    state = QuantState(torch.from_numpy(scales), torch.Size([86, 64]), None, 64, "nf4", torch.float32)
    again = dequantize_4bit(torch.from_numpy(codes)[:, None], state).numpy()
    np.testing.assert_array_equal(again, tensor.rows(10, 96))


def test_only_whole_blocks_are_nf4(bnb_checkpoint: Callable[[str], Checkpoint]) -> None:
    tensor = quantized(bnb_checkpoint("nf4"), DOWN)  # rows of a block and a half
    assert tensor.nf4_blocks(0, 64) is not None
    assert tensor.nf4_blocks(2, 4) is not None
    assert tensor.nf4_blocks(0, 1) is None
    assert tensor.nf4_blocks(1, 2) is None
    assert tensor.blocks(BlockFormat(96, 8, 32), 0, 64) is None
    assert not tensor.fits(BlockFormat(96, 8, 32), 0, 64)


@pytest.mark.parametrize("kind", ["fp4", "int8"])
def test_others_are_no_nf4(kind: str, bnb_checkpoint: Callable[[str], Checkpoint]) -> None:
    tensor = quantized(bnb_checkpoint(kind), GATE)
    assert tensor.nf4_block_size is None
    assert tensor.nf4_blocks(0, 96) is None


@pytest.mark.parametrize("name", [DOWN, GATE])
def test_int8_is_dequantized_as_by_bitsandbytes(name: str, bnb_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint = bnb_checkpoint("int8")
    stored = load_file(checkpoint.weight_files[0])
    expected = int8_vectorwise_dequant(stored[name], stored[f"{name.removesuffix('weight')}SCB"]).numpy()
    np.testing.assert_array_equal(whole(checkpoint, name), expected)
    np.testing.assert_array_equal(quantized(checkpoint, name).rows(5, 9), expected[5:9])


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("zero_point", [False, True])
def test_int8_keeps_its_codes(block_size: int, zero_point: bool, bnb_checkpoint: Callable[[str], Checkpoint]) -> None:
    checkpoint, form = bnb_checkpoint("int8"), BlockFormat(96, 8, block_size, zero_point)
    tensor = quantized(checkpoint, DOWN)
    blocks = tensor.blocks(form, 3, 60)
    assert tensor.fits(form, 3, 60)
    assert blocks is not None
    stored = load_file(checkpoint.weight_files[0])[DOWN][3:60].numpy()
    np.testing.assert_array_equal(blocks.codes[:, :96].astype(np.int16) - 128, stored)
    assert (blocks.codes[:, 96:] == 128).all()
    assert (blocks.zero_points is not None) == zero_point
    rows = tensor.rows(3, 60)
    assert (np.abs(dequantize_rows(blocks.codes, blocks.scales, 96, 8) - rows) <= np.abs(rows) * ROUNDING).all()
    np.testing.assert_array_equal(dequantize(blocks, form), dequantize_rows(blocks.codes, blocks.scales, 96, 8))
    assert not tensor.fits(BlockFormat(96, 4, block_size), 3, 60)
    assert tensor.blocks(BlockFormat(96, 4, block_size), 3, 60) is None


def test_transformers_saves_these_tensors(tiny_checkpoint: Callable[[str], TinyCheckpoint], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for kind, options in BNB.items():
        settings_of_it = BitsAndBytesConfig(**options)
        model = Gemma4ForCausalLM.from_pretrained(
            tiny_checkpoint("wide").target, quantization_config=settings_of_it, dtype=torch.bfloat16, device_map="cpu"
        )
        model.save_pretrained(tmp_path / kind)
        save_bnb(tmp_path / f"{kind}-here", options)
        theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in (kind, f"{kind}-here"))
        assert {name: tensor.tolist() for name, tensor in theirs.items()} == {
            name: tensor.tolist() for name, tensor in ours.items()
        }
        configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in (kind, f"{kind}-here")]
        assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


# compressed-tensors

PACKED_CASES = [
    # num_rows, width, bits, group_size
    (20, 64, 4, 32),
    (20, 128, 4, 64),
    (13, 96, 8, 32),
    (13, 40, 4, None),
    (9, 37, 4, None),  # rows end within a byte
    (9, 37, 8, None),
]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_rows", "width", "bits", "group_size"), PACKED_CASES)
def test_packed_rows(
    num_rows: int, width: int, bits: int, group_size: int | None, symmetric: bool, dtype: torch.dtype, tmp_path: Path
) -> None:
    tensors, levels, scales, zeros = packed_parts(num_rows, width, bits, group_size, symmetric, dtype)
    checkpoint = save(tmp_path, tensors, packed_config(scheme(bits, group_size, symmetric)))
    assert checkpoint.names() == [W]
    assert checkpoint.shape(W) == (num_rows, width)
    expected = dequantized(levels, scales, zeros, bits)
    np.testing.assert_array_equal(whole(checkpoint), expected)
    for start, stop in ((0, 1), (3, 4), (5, 9), (7, num_rows)):
        np.testing.assert_array_equal(quantized(checkpoint).rows(start, stop), expected[start:stop])


@pytest.mark.parametrize(("bits", "form_bits"), [(4, 4), (4, 8), (8, 8)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("width", "group_size", "block_size"), [(128, 32, 32), (128, 64, 32), (80, None, 32)])
def test_packed_codes_are_kept(
    bits: int, form_bits: int, symmetric: bool, width: int, group_size: int | None, block_size: int, tmp_path: Path
) -> None:
    tensors, levels, scales, zeros = packed_parts(20, width, bits, group_size, symmetric, torch.bfloat16)
    tensor = quantized(save(tmp_path, tensors, packed_config(scheme(bits, group_size, symmetric))))
    form = BlockFormat(width, form_bits, block_size, zero_point=not symmetric)
    blocks = tensor.blocks(form, 2, 19)
    assert blocks is not None
    moved = (1 << (form_bits - 1)) - (1 << (bits - 1))
    kept = unpack(blocks.codes, form_bits)
    np.testing.assert_array_equal(kept[:, :width], levels[2:19] + moved)
    assert blocks.codes.shape == (17, form.row_bytes)
    repeats = form.num_blocks // scales.shape[1]
    # bfloat16 has fewer digits than float16, and these scales are in its range
    np.testing.assert_array_equal(blocks.scales.astype(np.float32), np.repeat(scales[2:19], repeats, axis=1))
    np.testing.assert_array_equal(dequantize(blocks, form), tensor.rows(2, 19))
    if zeros is None:
        assert blocks.zero_points is None
        np.testing.assert_array_equal(
            dequantize_rows(blocks.codes, blocks.scales, width, form_bits), tensor.rows(2, 19)
        )
        assert (kept[:, width:] == form.middle).all()
    else:
        np.testing.assert_array_equal(blocks.zero_points, np.repeat(zeros[2:19], repeats, axis=1) + moved)
        assert tensor.blocks(BlockFormat(width, form_bits, block_size), 2, 19) is None
        assert (kept[:, width:] == zeros[2:19, -1:] + moved).all()


def test_formats_that_cannot_hold_the_codes(tmp_path: Path) -> None:
    tensors = packed_parts(8, 128, 8, 32)[0]
    tensor = quantized(save(tmp_path, tensors, packed_config(scheme(8, 32))))
    for bits, block_size, fits in ((8, 16, True), (8, 64, False), (4, 32, False)):
        form = BlockFormat(128, bits, block_size)
        assert tensor.fits(form, 0, 8) is fits
        assert (tensor.blocks(form, 0, 8) is not None) is fits


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from([16, 32, 64]),
    st.booleans(),
    st.sampled_from([16, 32]),
    st.data(),
)
@settings(max_examples=60, deadline=None)
def test_reencoding_is_exact_or_refused(
    num_rows: int, num_groups: int, group: int, symmetric: bool, block_size: int, data: st.DataObject
) -> None:
    bits, form_bits = data.draw(st.sampled_from([(4, 4), (4, 8), (8, 8), (8, 4)]))
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    width = num_groups * group if num_groups > 1 else data.draw(st.integers(1, 70))
    levels = rng.integers(0, 1 << bits, (num_rows, width), np.uint8)
    scales = rng.normal(size=(num_rows, num_groups)).astype(np.float16).astype(np.float32)
    zeros = None if symmetric else rng.integers(0, 1 << bits, (num_rows, num_groups), np.uint8)
    form = BlockFormat(width, form_bits, block_size, zero_point=data.draw(st.booleans()))
    blocks = reencode(levels, bits, scales, zeros, form)
    fits = form_bits >= bits and (symmetric or form.zero_point) and (num_groups == 1 or group % block_size == 0)
    assert (blocks is not None) == fits
    assert holds_codes(form, bits, num_groups, is_symmetric=symmetric) == fits
    if blocks is not None:
        assert (blocks.zero_points is not None) == form.zero_point
        np.testing.assert_array_equal(dequantize(blocks, form), dequantized(levels, scales, zeros, bits))


@pytest.mark.parametrize("scale", [65520.0, 1e30, 2.0**-25, 1.3e-7, -1e6])
def test_scales_that_float16_cannot_hold(scale: float) -> None:
    assert float16_scales(np.array([[1.0, scale]], np.float32)) is None


@pytest.mark.parametrize("scale", [0.0, 65504.0, 2.0**-24, 6.2e-5, -0.1])
def test_scales_that_float16_holds(scale: float) -> None:
    scales = np.array([[scale]], np.float32)
    halves = float16_scales(scales)
    assert halves is not None
    assert np.abs(halves.astype(np.float32) - scales) <= np.abs(scales) * 2**-11


def test_two_groups_of_modules(tmp_path: Path) -> None:
    tensors = packed_parts(16, 64, 4, 32)[0]
    wide, levels, scales, _ = packed_parts(12, 64, 8, None)
    tensors |= {name.replace("layer", "wide"): tensor for name, tensor in wide.items()}
    tensors["plain.weight"] = torch.ones(3, 4)
    checkpoint = save(tmp_path, tensors, {"text_config": packed_config(scheme(4, 32), scheme(8, None))})
    assert sorted(checkpoint.names()) == [W, "plain.weight", "wide.weight"]
    np.testing.assert_array_equal(whole(checkpoint, "wide.weight"), dequantized(levels, scales, None, 8))
    assert quantized(checkpoint).blocks(BlockFormat(64, 4, 32), 0, 16) is not None
    assert whole(checkpoint, "plain.weight").sum() == 12


@pytest.mark.parametrize("g_idx", [np.arange(64) // 32, np.full(64, -1)])
def test_columns_in_their_own_order(g_idx: npt.NDArray[np.int64], tmp_path: Path) -> None:
    tensors, levels, scales, _ = packed_parts(16, 64, 4, 32)
    tensors["layer.weight_g_idx"] = torch.from_numpy(g_idx.astype(np.int32))
    checkpoint = save(tmp_path, tensors, packed_config(scheme(4, 32, actorder="weight")))
    np.testing.assert_array_equal(whole(checkpoint), dequantized(levels, scales, None, 4))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_what_compressed_tensors_packs(bits: int, symmetric: bool, group_size: int | None, tmp_path: Path) -> None:
    pack = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    torch.manual_seed(0)
    num_groups = 1 if group_size is None else 96 // group_size
    weights = QuantizationArgs(**scheme(bits, group_size, symmetric))
    args = QuantizationScheme(targets=["Linear"], weights=weights)
    half = 1 << (bits - 1)
    state = {
        "weight": torch.randn(13, 96),
        "weight_scale": torch.rand(13, num_groups) / half + 1e-3,
        "weight_zero_point": torch.randint(-half, half, (13, num_groups), dtype=torch.int8),
    }
    if symmetric:
        del state["weight_zero_point"]
    compressor = pack.PackedQuantizationCompressor
    compressed = compressor.compress(state, args)
    tensors = {f"layer.{name}": tensor for name, tensor in compressed.items()}
    checkpoint = save(tmp_path, tensors, packed_config(weights.model_dump()))
    expected = compressor.decompress(compressed, args)["weight"].numpy()
    np.testing.assert_array_equal(whole(checkpoint), expected)
    np.testing.assert_array_equal(quantized(checkpoint).rows(5, 11), expected[5:11])
