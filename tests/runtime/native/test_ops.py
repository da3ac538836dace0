"""The native ops against plain numpy, their row invariance, and what they say to wrong inputs."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from runtime.kv_rows import KV_BLOCK, KV_DTYPES, KVDtype, decode_rows, encode_rows
from tests.layouts import needs_native
from tests.runtime.native.op_models import (
    OpModel,
    aligned,
    gelu,
    pack_panels,
    quantized_product,
    rms_norm,
    rotate,
    run,
)

Array = npt.NDArray[Any]
pytestmark = needs_native
FLOAT = {"y": "float32"}


@dataclass
class Weights:
    """A random quantized matrix."""

    num_rows: int
    width: int
    bits: int
    block_size: int
    codes: Array = field(init=False)
    scales: Array = field(init=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.num_rows * 31 + self.width)
        num_blocks = -(-self.width // self.block_size)
        self.codes = rng.integers(0, 1 << self.bits, (self.num_rows, self.width)).astype(np.uint8)
        self.scales = (rng.uniform(-0.1, 0.1, (self.num_rows, num_blocks))).astype(np.float16)

    @property
    def panels(self) -> Array:
        return pack_panels(self.codes, self.scales, self.bits, self.block_size)

    @property
    def attributes(self) -> dict[str, int]:
        return {"K": self.width, "N": self.num_rows, "bits": self.bits, "block_size": self.block_size}

    def times(self, x: Array) -> Array:
        return quantized_product(x, self.codes, self.scales, self.bits, self.block_size)


def random(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("epilogue", ["plain", "gelu_glu", "gelu_multiply", "softcap"])
@pytest.mark.parametrize(("num_rows", "width"), [(64, 128), (40, 100), (2, 33), (330, 768)])
@pytest.mark.parametrize("block_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_product_equals_the_reference_and_every_row_is_the_same_among_any_others(
    bits: int, block_size: int, num_rows: int, width: int, epilogue: str, threads: int
) -> None:
    weights = Weights(num_rows, width, bits, block_size)
    x = random(29, width)
    product = weights.times(x)
    half = num_rows // 2
    other = random(29, num_rows, seed=1)
    expected = {
        "plain": product,
        "gelu_glu": gelu(product[:, :half]) * product[:, half:],
        "gelu_multiply": gelu(product) * other,
        "softcap": 5 * np.tanh(product / 5),
    }[epilogue]
    inputs = {"x": x, "weight": weights.panels} | ({"other": other} if epilogue == "gelu_multiply" else {})
    number = ["plain", "gelu_glu", "gelu_multiply", "softcap"].index(epilogue)
    model = OpModel(
        "QuantizedMatMul", inputs, FLOAT, threads=threads, epilogue=number, softcap=5.0, **weights.attributes
    )
    (together,) = model.run(inputs)
    # float32 sums of up to 24 blocks, and the ratio of polynomials that stands for tanh: 1e-6 each
    np.testing.assert_allclose(together, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    for first, last in [(0, 1), (1, 3), (3, 6), (6, 10), (10, 15), (15, 21), (21, 29), (0, 13)]:
        rows = {name: array if name == "weight" else array[first:last] for name, array in inputs.items()}
        np.testing.assert_array_equal(model.run(rows)[0], together[first:last])


def test_product_of_values_that_are_no_numbers_is_no_number() -> None:
    weights = Weights(40, 64, 4, 32)
    x = random(3, 64)
    x[1, 5], x[2, 60] = np.nan, np.inf
    (y,) = run("QuantizedMatMul", {"x": x, "weight": weights.panels}, FLOAT, epilogue=0, **weights.attributes)
    assert np.isfinite(y[0]).all()
    assert np.isnan(y[1:]).all()


@pytest.mark.parametrize("group_size", [128, 32, 20, 3])
def test_selected_product_is_rows_of_the_whole_one(group_size: int) -> None:
    weights = Weights(group_size * 9, 96, 8, 32)
    x = random(1, 96)
    groups = np.array([7, 0, 8, 3, 3], np.int64)
    inputs = {"x": x, "weight": weights.panels, "groups": groups}
    (y,) = run("SelectedMatMul", inputs, FLOAT, group_size=group_size, **weights.attributes)
    whole = {"x": x, "weight": inputs["weight"]}
    (product,) = run("QuantizedMatMul", whole, FLOAT, epilogue=0, **weights.attributes)
    np.testing.assert_array_equal(y, product.reshape(9, group_size)[groups].ravel())


@pytest.mark.parametrize("size", [256, 1536, 7])
@pytest.mark.parametrize("num_rows", [1, 40])
def test_norm_add(num_rows: int, size: int) -> None:
    x, residual = random(num_rows, size), random(num_rows, size, seed=1)
    weight, next_weight = random(size, seed=2), random(size, seed=3)
    inputs = {"x": x, "weight": weight, "residual": residual, "next_weight": next_weight}
    attributes = {"epsilon": 1e-6, "next_epsilon": 1e-3, "scale": -0.7}
    total, normed = run("NormAdd", inputs, {"total": "float32", "normed": "float32"}, **attributes)
    expected = -0.7 * (residual + rms_norm(x.astype(np.float64)) * weight)
    np.testing.assert_allclose(total, expected, atol=2e-6 * np.abs(expected).max())
    np.testing.assert_allclose(normed, rms_norm(expected, 1e-3) * next_weight, atol=1e-5)
    (alone,) = run("NormAdd", inputs | {"next_weight": None}, {"total": "float32"}, **attributes)
    np.testing.assert_array_equal(alone, total)


def test_rotary() -> None:
    positions, frequencies = np.array([0, 1, 511, 131071], np.int64), random(16) ** 2
    cos, sin = run("Rotary", {"p": positions, "f": frequencies}, {"cos": "float32", "sin": "float32"})
    angles = (positions[:, None].astype(np.float32) * frequencies).astype(np.float64)
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-7)


@pytest.mark.parametrize(("num_rows", "size", "k"), [(1, 50000, 128), (4, 9000, 64), (2, 100, 100), (1, 5, 1)])
def test_top_logits(num_rows: int, size: int, k: int) -> None:
    logits = np.round(random(num_rows, size) * 50)  # many ties
    values, ids = run("TopLogits", {"x": logits}, {"values": "float32", "ids": "int64"}, k=k)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(logits, order, 1))


@pytest.mark.parametrize("place", [0, 4321, 8999])
def test_top_logits_hand_on_a_nan(place: int) -> None:
    logits = random(2, 9000)
    logits[1, place] = np.nan
    values, ids = run("TopLogits", {"x": logits}, {"values": "float32", "ids": "int64"}, k=7)
    assert np.isfinite(values[0]).all()
    assert np.isnan(values[1]).all()
    assert ((ids >= 0) & (ids < 9000)).all()


@dataclass
class Attention:
    """Random inputs of CachedAttention for `num_tokens` tokens whose KV rows begin at row 0."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int
    owns_kv: bool
    num_tokens: int
    kv_dtype: KVDtype = "float16"

    def __post_init__(self) -> None:
        heads = self.num_heads + (2 * self.num_kv_heads if self.owns_kv else 0)
        self.x = random(self.num_tokens, heads * self.head_dim)
        self.norms = random(2 if self.owns_kv else 1, self.head_dim, seed=1) + 0.5
        angles = random(self.num_tokens, self.head_dim // 2, seed=2)
        self.cos, self.sin = np.cos(angles), np.sin(angles)
        pairs = range(2 * self.num_kv_heads)
        rows = (random(self.num_tokens + 5, self.head_dim, seed=3 + i) for i in pairs)
        self.cache = [encode_rows(values, self.kv_dtype) for values in rows]
        self.model = OpModel(
            "CachedAttention",
            self.inputs(0, 1, self.cache, 0),
            FLOAT,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            window=self.window,
            epsilon=1e-6,
        )

    def inputs(self, first: int, last: int, cache: list[Array], first_row: int) -> dict[str, Array | None]:
        tokens = slice(first, last)
        rows = np.array([first_row, last, first_row], np.int64)
        named = {
            "x": self.x[tokens],
            "norms": self.norms,
            "cos": self.cos[tokens],
            "sin": self.sin[tokens],
            "rows": rows,
        }
        return named | {f"cache_{i}": array for i, array in enumerate(cache)}

    def expected(self, cache: list[Array]) -> Array:
        """[num_tokens, num_heads * head_dim] in float64, over the rows that the op left in `cache`."""
        heads = self.x.reshape(self.num_tokens, -1, self.head_dim).astype(np.float64)
        cos, sin, group = self.cos[:, None], self.sin[:, None], self.num_heads // self.num_kv_heads
        queries = rotate(rms_norm(heads[:, : self.num_heads]) * self.norms[0], cos, sin)
        tokens = np.arange(self.num_tokens)
        visible = tokens[None] <= tokens[:, None]
        if self.window:
            visible &= tokens[None] > tokens[:, None] - self.window
        outputs = []
        for head in range(self.num_heads):
            keys, values = (
                decode_rows(cache[2 * (head // group) + i][: self.num_tokens], self.head_dim).astype(np.float64)
                for i in range(2)
            )
            scores = np.where(visible, queries[:, head] @ keys.T, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            outputs.append(weights / weights.sum(-1, keepdims=True) @ values)
        return np.stack(outputs, 1).reshape(self.num_tokens, -1)

    def exact_rows(self) -> list[Array]:
        """What the op's new rows round, in float64 and in the order of the cache."""
        heads = self.x.reshape(self.num_tokens, -1, self.head_dim).astype(np.float64)
        rows = []
        for kv_head in range(self.num_kv_heads):
            keys = rms_norm(heads[:, self.num_heads + kv_head]) * self.norms[1]
            values = rms_norm(heads[:, self.num_heads + self.num_kv_heads + kv_head])
            rows += [rotate(keys, self.cos, self.sin), values]
        return rows


Shape = tuple[int, int, int, int, bool, int]
each_kv_dtype = pytest.mark.parametrize("kv_dtype", KV_DTYPES)
ATTENTIONS: list[Shape] = [
    (8, 1, 256, 0, True, 300),
    (8, 1, 64, 100, True, 400),
    (8, 2, 32, 33, True, 200),
    (6, 3, 6, 0, True, 150),
    (4, 1, 150, 0, True, 140),  # the last block of an int8 row is shorter
    (8, 1, 128, 128, False, 300),
    (1, 1, 16, 0, False, 260),
    (40, 1, 16, 0, True, 40),
    (8, 1, 16, 0, True, 2200),  # more partial results than are held at once
]


@each_kv_dtype
@pytest.mark.parametrize("shape", ATTENTIONS)
def test_attention_equals_the_reference(shape: Shape, kv_dtype: KVDtype) -> None:
    attention = Attention(*shape, kv_dtype)
    cache = [array.copy() for array in attention.cache]
    (y,) = attention.model.run(attention.inputs(0, attention.num_tokens, cache, 0))
    # scores are sums of head_dim float32 products: their error is what the exponential multiplies
    np.testing.assert_allclose(y, attention.expected(cache), atol=2e-4)
    first_untouched = attention.num_tokens if attention.owns_kv else 0
    for array, before in zip(cache, attention.cache, strict=True):
        np.testing.assert_array_equal(array[first_untouched:], before[first_untouched:])


def step_sizes(rows: Array, head_dim: int, kv_dtype: KVDtype) -> Array:
    """Between a value of a row and the next one that the type has, [num_rows, head_dim]."""
    if kv_dtype != "int8":
        return np.asarray(np.spacing(np.abs(rows.view(kv_dtype))).astype(np.float64))
    scales = rows[:, head_dim:].copy().view(np.float16).astype(np.float64)
    return np.repeat(scales, KV_BLOCK, axis=1)[:, :head_dim]


@each_kv_dtype
@pytest.mark.parametrize("shape", [shape for shape in ATTENTIONS if shape[4]])
def test_new_rows_are_rounded_to_the_nearest_value_of_their_type(shape: Shape, kv_dtype: KVDtype) -> None:
    attention = Attention(*shape, kv_dtype)
    cache = [array.copy() for array in attention.cache]
    attention.model.run(attention.inputs(0, attention.num_tokens, cache, 0))
    for array, exact in zip(cache, attention.exact_rows(), strict=True):
        rows = array[: attention.num_tokens]
        found, steps = decode_rows(rows, attention.head_dim), step_sizes(rows, attention.head_dim, kv_dtype)
        # half a step, and what float32 is off by before it rounds: the norm's sum, a rotation
        assert (np.abs(found - exact) <= steps / 2 + 2e-6).all()


@pytest.mark.parametrize("shape", [shape for shape in ATTENTIONS if shape[4]])
def test_an_int8_block_uses_all_its_codes(shape: Shape) -> None:
    attention = Attention(*shape, "int8")
    cache = [array.copy() for array in attention.cache]
    attention.model.run(attention.inputs(0, attention.num_tokens, cache, 0))
    for array, exact in zip(cache, attention.exact_rows(), strict=True):
        rows, head_dim = array[: attention.num_tokens], attention.head_dim
        for first in range(0, head_dim, KV_BLOCK):
            block = slice(first, min(first + KV_BLOCK, head_dim))
            assert (np.abs(rows[:, block].view(np.int8).astype(int)).max(1) == 127).all()
            place = head_dim + first // KV_BLOCK * 2
            scales = rows[:, place : place + 2].copy().view(np.float16)[:, 0]
            # a scale is rounded to 11 bits
            np.testing.assert_allclose(scales, np.abs(exact[:, block]).max(1) / 127, rtol=2**-11 + 1e-5)


@each_kv_dtype
def test_rows_of_zeros_stay_zero(kv_dtype: KVDtype) -> None:
    attention = Attention(2, 1, 72, 0, True, 3, kv_dtype)
    attention.x[:] = 0
    cache = [array.copy() for array in attention.cache]
    (y,) = attention.model.run(attention.inputs(0, 3, cache, 0))
    np.testing.assert_array_equal(y, 0)
    for array in cache:
        np.testing.assert_array_equal(decode_rows(array[:3], 72), 0)


def test_halfway_cases_round_to_even_and_what_is_too_large_to_infinity() -> None:
    step, least = 2.0**-10, 2.0**-24  # float16's step from 1 on, and its smallest number
    values = [1 + step / 2, 1 + 1.5 * step, -1 - step / 2, 2 - step / 2, 0.1, least / 2, 1.5 * least, -2.5 * least]
    values += [2.0**-14 - least / 2, 65503.9, 65519.99, 65520.0, -65519.99, -1e30, 0.0, 3e-9]
    weight = np.array(values, np.float32)
    # a row of ones has norm 1, so the key is the norm's weight, not rotated
    inputs = {
        "x": np.ones((1, 48), np.float32),
        "norms": np.stack([np.ones(16, np.float32), weight]),
        "cos": np.ones((1, 8), np.float32),
        "sin": np.zeros((1, 8), np.float32),
        "rows": np.array([0, 1, 0], np.int64),
        "keys": np.zeros((1, 32), np.uint8),
        "values": np.zeros((1, 32), np.uint8),
    }
    run("CachedAttention", inputs, FLOAT, num_heads=1, num_kv_heads=1, window=0, epsilon=0.0)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(inputs["keys"].view(np.float16)[0], weight.astype(np.float16))
    np.testing.assert_array_equal(inputs["values"].view(np.float16), np.ones((1, 16), np.float16))


HOLED: list[Shape] = [(8, 1, 32, 0, True, 40), (8, 2, 16, 10, True, 12), (4, 1, 150, 0, True, 12)]


@each_kv_dtype
@pytest.mark.parametrize("shape", HOLED)
def test_a_nan_spoils_the_tokens_that_see_it_alone(shape: Shape, kv_dtype: KVDtype) -> None:
    attention = Attention(*shape, kv_dtype)
    attention.x[9] = np.nan
    (y,) = attention.model.run(attention.inputs(0, attention.num_tokens, attention.cache, 0))
    assert np.isfinite(y[:9]).all()
    assert np.isnan(y[9:]).all()


@each_kv_dtype
@pytest.mark.parametrize("shape", HOLED)
def test_one_value_that_is_no_number_is_seen(shape: Shape, kv_dtype: KVDtype) -> None:
    attention = Attention(*shape, kv_dtype)
    attention.x[9, -1] = np.inf  # the norm of its head makes it NaN, and the head's other values 0
    (y,) = attention.model.run(attention.inputs(0, attention.num_tokens, attention.cache, 0))
    assert np.isfinite(y[:9]).all()
    assert np.isnan(y[9:, -1]).all()


@each_kv_dtype
@pytest.mark.parametrize("steps", [[1] * 30, [2, 3, 4, 5, 6, 7, 8], [17, 1, 12], [16, 8]])
@pytest.mark.parametrize("shape", ATTENTIONS)
def test_attention_of_a_token_is_the_same_bits_in_any_forward(
    shape: Shape, steps: list[int], kv_dtype: KVDtype
) -> None:
    attention = Attention(*shape, kv_dtype)
    whole = [array.copy() for array in attention.cache]
    (together,) = attention.model.run(attention.inputs(0, attention.num_tokens, whole, 0))
    cache = [array.copy() for array in whole]
    for array in cache:
        array[attention.num_tokens - sum(steps) :] = 7  # to be written again
    first = attention.num_tokens - sum(steps)
    if not attention.owns_kv:
        cache = whole
    for num_tokens in steps:
        window = attention.window
        first_row = max(0, first - window + 1) if window else 0
        (y,) = attention.model.run(attention.inputs(first, first + num_tokens, cache, first_row))
        np.testing.assert_array_equal(y, together[first : first + num_tokens])
        first += num_tokens
    for array, expected in zip(cache, whole, strict=True):
        np.testing.assert_array_equal(array[: attention.num_tokens], expected[: attention.num_tokens])


def attention_inputs(**changed: Array) -> dict[str, Array | None]:
    attention = Attention(2, 1, 16, 0, True, 4)
    return attention.inputs(0, 4, attention.cache, 0) | changed


WEIGHTS = Weights(40, 64, 4, 32)
MATMUL = {"epilogue": 0, **WEIGHTS.attributes}


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "message"),
    [
        ("QuantizedMatMul", {}, MATMUL | {"bits": 5}, "bits must be 4 or 8"),
        ("QuantizedMatMul", {}, MATMUL | {"bits": 2}, "attribute bits is 2, expected 4 to 8"),
        ("QuantizedMatMul", {}, MATMUL | {"block_size": 48}, "block_size must be a multiple of 32"),
        ("QuantizedMatMul", {}, MATMUL | {"K": 0}, "attribute K is 0, expected 1 to"),
        ("QuantizedMatMul", {}, MATMUL | {"K": 96}, "x has another width than K"),
        ("QuantizedMatMul", {}, MATMUL | {"N": 1 << 40}, "attribute N is 1099511627776"),
        ("QuantizedMatMul", {}, {"K": 64}, "attribute N is missing or of another type"),
        ("QuantizedMatMul", {}, MATMUL | {"epilogue": 9}, "attribute epilogue is 9, expected 0 to 3"),
        ("QuantizedMatMul", {}, MATMUL | {"epilogue": 2}, "other has not the shape of the product"),
        ("QuantizedMatMul", {}, MATMUL | {"epilogue": 3, "softcap": 0.0}, "softcap must be above 0"),
        ("QuantizedMatMul", {}, MATMUL | {"N": 39, "epilogue": 1}, "gate and up differ in size"),
        ("QuantizedMatMul", {}, MATMUL | {"N": 65}, "the weights are 2304 bytes, expected 3456"),
        (
            "QuantizedMatMul",
            {"weight": aligned(WEIGHTS.panels, offset=4)},
            MATMUL,
            "the weights are not aligned to 64 bytes",
        ),
        (
            "SelectedMatMul",
            {"groups": np.array([0, 10], np.int64)},
            WEIGHTS.attributes | {"group_size": 4},
            "a group is not there",
        ),
        (
            "SelectedMatMul",
            {"groups": np.array([-1], np.int64)},
            WEIGHTS.attributes | {"group_size": 4},
            "a group is not there",
        ),
        ("SelectedMatMul", {"groups": np.array([0], np.int64)}, WEIGHTS.attributes | {"group_size": 3}, "no multiple"),
    ],
)
def test_a_wrong_product_is_an_error_with_its_reason(
    op: str, inputs: dict[str, Array], attributes: dict[str, Any], message: str
) -> None:
    given: dict[str, Array | None] = {"x": random(1, 64), "weight": WEIGHTS.panels, **inputs}
    with pytest.raises(Exception, match=f"{op}: .*{message}"):
        run(op, given, FLOAT, **attributes)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": np.array([0, 10, 0])}, "rows lie outside of the KV arrays"),
        ({"rows": np.array([-1, 4, 0])}, "rows lie outside of the KV arrays"),
        ({"rows": np.array([2, 4, 0])}, "rows are fewer than tokens"),
        ({"rows": np.array([0, 4, -3])}, "position of the first row is out of range"),
        ({"rows": np.array([0, 4])}, "rows must be"),
        ({"x": random(4, 48)}, "x has another width than its heads"),
        ({"norms": random(3, 16)}, "norms must be"),
        ({"cos": random(4, 4)}, "cos and sin must be"),
        ({"cache_0": np.zeros((9, 31), np.uint8)}, "a KV row has another size than head_dim values take in any type"),
        ({"cache_1": np.zeros((9, 64), np.uint8)}, "KV rows differ in size"),
        ({"cache_1": np.zeros((3, 32), np.uint8)}, "rows lie outside of the KV arrays"),
        ({"cache_1": aligned(np.zeros((9, 32), np.uint8), offset=2)}, "KV rows are not aligned to 4 bytes"),
    ],
)
def test_wrong_attention_is_an_error_with_its_reason(changed: dict[str, Array], message: str) -> None:
    inputs = attention_inputs(**changed)
    with pytest.raises(Exception, match=f"CachedAttention: .*{message}"):
        run("CachedAttention", inputs, FLOAT, num_heads=2, num_kv_heads=1, window=0, epsilon=1e-6)


def test_rows_that_are_no_bytes_are_an_error() -> None:
    with pytest.raises(Exception, match="float"):
        run(
            "CachedAttention",
            attention_inputs(cache_0=random(9, 16)),
            FLOAT,
            num_heads=2,
            num_kv_heads=1,
            window=0,
            epsilon=1e-6,
        )


def test_more_kv_heads_than_arrays_is_an_error() -> None:
    with pytest.raises(Exception, match="CachedAttention: .*keys and values are due for each KV head"):
        run(
            "CachedAttention",
            attention_inputs(x=random(4, 96)),
            FLOAT,
            num_heads=2,
            num_kv_heads=2,
            window=0,
            epsilon=1e-6,
        )


def test_no_rows_are_no_work() -> None:
    (y,) = run("QuantizedMatMul", {"x": random(0, 64), "weight": WEIGHTS.panels}, FLOAT, **MATMUL)
    assert y.shape == (0, 40)
