"""A recipe says of every tensor how it is stored: later rules win, and what no graph can hold is refused by name."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quant.recipe import (
    BITS,
    BLOCK_SIZES,
    MAX_RECIPE_BYTES,
    Choice,
    Recipe,
    RecipeError,
    Rule,
    WeightFormat,
    make_recipe,
    parse_recipe,
    read_recipe,
    recipe_names,
)

MLP = ["layers.7.mlp.gate_up_proj", "layers.0.mlp.down_proj"]
PLAIN = ["layers.0.self_attn.qkv_proj", "layers.34.self_attn.o_proj", *MLP]
PLE = ["layers.3.per_layer_input_gate", "layers.3.per_layer_projection", "per_layer_model_projection.0"]
DRAFTER = ["drafter.pre_projection", "drafter.embed_tokens", "drafter.layers.0.mlp.down_proj", "drafter.centroids"]
TABLES = ["token_table", "ple_table"]
TENSORS = [*PLAIN, *PLE, *DRAFTER, *TABLES]
ALL_FOUR = '[[rule]]\ntensors = "*"\nbits = 4\n'

# characters that TOML must escape or that end something, and some that it leaves alone
TEXTS = st.text(
    st.sampled_from("ab*?.[]\"\\'#=\n\t\r\0\x1f\x7f\x85é🙂") | st.characters(exclude_categories=["Cs"]), max_size=8
)
RULES = st.builds(
    Rule,
    st.lists(TEXTS.filter(bool), min_size=1, max_size=3).map(tuple),
    st.none() | st.sampled_from(BITS),
    st.none() | st.sampled_from(BLOCK_SIZES),
    st.none() | st.booleans(),
    st.none() | st.sampled_from(["int", "nf4"]),
    st.none() | st.sampled_from(["nearest", "search", "importance", "gptq", "best"]),
)
# gives everything that `choose` looks at, so that any rules before it are accepted
LAST = Rule(("*",), 4, 32, False, "int", "best")


def recipe_of(*rules: Rule, activations: str = "int8") -> Recipe:
    return Recipe("mine", "", activations, rules)  # type: ignore[arg-type]


def integers(bits: int, block_size: int) -> WeightFormat:
    return WeightFormat(bits, block_size)


# the recipes that come with the package


def test_the_built_in_recipes() -> None:
    assert {"fp16", "fp32", "int4", "int4-mixed", "int4-small", "int8", "nf4"} <= set(recipe_names())


@pytest.mark.parametrize("name", recipe_names())
def test_a_built_in_recipe_chooses_for_every_tensor(name: str) -> None:
    recipe = read_recipe(name)
    assert (recipe.name, bool(recipe.description)) == (name, True)
    for tensor in TENSORS:
        form = recipe.choose(tensor).form
        assert (form.block_size in BLOCK_SIZES) == form.is_quantized == (form.bits in (4, 8))


@pytest.mark.parametrize("name", ["int4", "int4-mixed", "int4-small"])
def test_four_bits_keep_eight_where_it_is_small_and_sensitive(name: str) -> None:
    recipe = read_recipe(name)
    assert {recipe.choose(tensor).form.bits for tensor in ("layers.7.mlp.gate_up_proj", "ple_table")} == {4}
    assert {recipe.choose(tensor).form.bits for tensor in (*PLE, *DRAFTER)} == {8}


@pytest.mark.parametrize(
    ("name", "plain", "ple", "drafter", "token_table", "ple_table"),
    [
        ("fp16", *5 * [WeightFormat(16, 0)]),
        ("fp32", *5 * [WeightFormat(32, 0)]),
        ("int8", *5 * [integers(8, 32)]),
        ("int4", integers(4, 32), integers(8, 32), integers(8, 32), integers(4, 32), integers(4, 32)),
        ("int4-small", integers(4, 128), integers(8, 128), integers(8, 128), integers(4, 128), integers(4, 256)),
        (
            "nf4",
            WeightFormat(4, 64, codebook="nf4"),
            *2 * [integers(8, 32)],
            *2 * [integers(4, 32)],
        ),
    ],
)
def test_formats_of_the_built_in_recipes(
    name: str,
    plain: WeightFormat,
    ple: WeightFormat,
    drafter: WeightFormat,
    token_table: WeightFormat,
    ple_table: WeightFormat,
) -> None:
    recipe = read_recipe(name)
    groups = [(PLAIN, plain), (PLE, ple), (DRAFTER, drafter), (TABLES[:1], token_table), (TABLES[1:], ple_table)]
    for tensors, form in groups:
        assert {recipe.choose(tensor).form for tensor in tensors} == {form}


@pytest.mark.parametrize(
    ("name", "plain", "table"),
    [
        ("int4", "search", "search"),
        ("int4-mixed", "best", "best"),
        ("int4-small", "best", "best"),
        ("int8", "nearest", "nearest"),
        ("nf4", "nearest", "search"),
    ],
)
def test_methods_of_the_built_in_recipes(name: str, plain: str, table: str) -> None:
    recipe = read_recipe(name)
    assert {recipe.choose(tensor).method for tensor in PLAIN} == {plain}
    assert {recipe.choose(tensor).method for tensor in TABLES} == {table}


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_the_recipe_behind_bits(bits: int, block_size: int) -> None:
    recipe = make_recipe(bits, block_size, "float32")
    assert recipe.activations == "float32"
    for tensor in TENSORS:
        stored = max(bits, 8) if tensor in (*PLE, *DRAFTER) else bits
        form = WeightFormat(stored, block_size if stored < 16 else 0)
        assert recipe.choose(tensor) == Choice(form, "nearest")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3,), r"--bits 3: choose one of 4, 8, 16, 32"),
        ((4, 48), r"--block-size 48: choose one of 16, 32, 64, 128, 256"),
        ((4, 32, "int4"), r"--activations int4: choose int8 or float32"),
    ],
)
def test_what_bits_cannot_be(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(*arguments)  # type: ignore[arg-type]


# rules


def test_later_rules_win_key_by_key() -> None:
    recipe = recipe_of(
        Rule(("*",), bits=4, block_size=64, method="search"),
        Rule(("layers.*.mlp.*",), block_size=16),
        Rule(("layers.1.*", "ple_table"), bits=8),
        Rule(("layers.1.mlp.down_proj",), method="nearest"),
    )
    assert recipe.choose("token_table") == Choice(integers(4, 64), "search")
    assert recipe.choose("layers.0.mlp.down_proj") == Choice(integers(4, 16), "search")
    assert recipe.choose("layers.1.self_attn.o_proj") == Choice(integers(8, 64), "search")
    assert recipe.choose("layers.1.mlp.down_proj") == Choice(integers(8, 16), "nearest")
    assert recipe.choose("layers.10.mlp.down_proj") == Choice(integers(4, 16), "search")
    assert recipe.choose("ple_table") == Choice(integers(8, 64), "search")


@settings(max_examples=60, deadline=None)
@given(st.lists(RULES, max_size=4), st.sampled_from(TENSORS))
def test_the_last_rule_decides_alone_where_it_gives_everything(rules: list[Rule], tensor: str) -> None:
    assert recipe_of(*rules, LAST).choose(tensor) == recipe_of(LAST).choose(tensor)
    assert recipe_of(*rules).with_rules([LAST]).choose(tensor) == recipe_of(LAST).choose(tensor)


def test_what_no_rule_gives() -> None:
    assert recipe_of(Rule(("*",), bits=4)).choose("m") == Choice(WeightFormat(4, 32, False, "int"), "best")


def test_patterns_tell_case_apart_and_match_whole_names() -> None:
    recipe = recipe_of(Rule(("*",), bits=4), Rule(("Token_table", "oken_table", "layers.?.mlp.[du]*"), bits=8))
    assert recipe.choose("token_table").form.bits == 4
    assert recipe.choose("layers.3.mlp.down_proj").form.bits == 8
    assert recipe.choose("layers.13.mlp.down_proj").form.bits == 4


def test_floats_have_neither_blocks_nor_zero_points() -> None:
    recipe = recipe_of(Rule(("*",), bits=4, block_size=64, zero_point=True), Rule(("m", "*_table"), bits=16))
    assert [recipe.choose(name).form for name in ("m", "token_table")] == 2 * [WeightFormat(16, 0)]
    assert recipe.choose("other").form == WeightFormat(4, 64, True)


def test_with_rules_changes_fields_too() -> None:
    recipe = recipe_of(Rule(("*",), bits=4))
    other = recipe.with_rules([Rule(("m",), bits=8)], name="other", activations="float32")
    assert (other.name, other.activations, len(other.rules)) == ("other", "float32", 2)
    assert (other.choose("m").form.bits, recipe.choose("m").form.bits) == (8, 4)


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (WeightFormat(16, 0), "float16"),
        (WeightFormat(4, 64), "int4 in blocks of 64"),
        (WeightFormat(8, 32, True), "int8 in blocks of 32 with zero points"),
        (WeightFormat(4, 64, codebook="nf4"), "nf4 in blocks of 64"),
    ],
)
def test_a_format_s_name(form: WeightFormat, text: str) -> None:
    assert str(form) == text


# the native layout


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_native_products_take_symmetric_integers_in_blocks_of_32_and_more(bits: int, block_size: int) -> None:
    form = WeightFormat(bits, block_size if bits < 16 else 0)
    assert form.allows_native == (bits < 16 and block_size >= 32)
    assert not WeightFormat(bits, block_size, zero_point=True).allows_native
    assert not WeightFormat(4, block_size, codebook="nf4").allows_native


@pytest.mark.parametrize(
    ("name", "native"),
    [
        ("fp16", False),
        ("fp32", False),
        ("int4", True),
        ("int4-mixed", True),
        ("int4-small", True),
        ("int8", True),
        ("nf4", False),
    ],
)
def test_which_built_in_recipes_allow_native(name: str, native: bool) -> None:
    assert read_recipe(name).allows_native(TENSORS) == native


def test_one_matrix_that_is_not_native_is_enough_but_the_ple_table_is_not_multiplied_with() -> None:
    def changed(tensor: str) -> Recipe:
        return recipe_of(Rule(("*",), bits=4), Rule((tensor,), bits=16))

    assert recipe_of(Rule(("*",), bits=4)).allows_native(TENSORS)
    assert changed("ple_table").allows_native(TENSORS)
    for tensor in TENSORS[:-1]:
        assert not changed(tensor).allows_native(TENSORS)
        assert changed(tensor).allows_native(set(TENSORS) - {tensor})
    assert not recipe_of(Rule(("*",), bits=4), activations="float32").allows_native(TENSORS)


# files


@settings(max_examples=100, deadline=None)
@given(st.lists(RULES, max_size=4), TEXTS, st.sampled_from(["int8", "float32"]))
def test_a_recipe_written_and_read_is_the_same(rules: list[Rule], description: str, activations: str) -> None:
    recipe = Recipe("mine", " ".join(description.split()), activations, (*rules, LAST))  # type: ignore[arg-type]
    assert parse_recipe("mine", recipe.to_toml()) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_a_built_in_recipe_written_and_read_is_the_same(name: str, tmp_path: Path) -> None:
    recipe, path = read_recipe(name), tmp_path / "copy.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    copy = read_recipe(str(path))
    assert copy.name == str(path)
    assert (copy.rules, copy.activations, copy.description) == (recipe.rules, recipe.activations, recipe.description)


def test_values_for_the_manifest_are_what_the_file_says() -> None:
    text = 'description = "d"\nactivations = "float32"\n[[rule]]\ntensors = "*"\nbits = 4\nzero_point = false\n'
    assert parse_recipe("mine", text).to_json() == {
        "name": "mine",
        "description": "d",
        "activations": "float32",
        "rules": [{"tensors": ["*"], "bits": 4, "zero_point": False}],
    }


def rule(*lines: str) -> str:
    """A rule behind one that gives all tensors 4 bits."""
    return ALL_FOUR + "\n".join(["[[rule]]", *lines])


REFUSED = {
    "key": (f"bits = 4\n{ALL_FOUR}", r"mine: unknown key 'bits'; known are description, activations, rule"),
    "rule key": (
        rule('tensors = "a"', "group_size = 32"),
        r"mine: rule 2: unknown key 'group_size'; known are tensors, bits, block_size, zero_point, codebook, method",
    ),
    "bits": (rule('tensors = "a"', "bits = 3"), r"mine: rule 2: bits is 3, expected one of 4, 8, 16, 32$"),
    "float": (rule('tensors = "a"', "bits = 4.0"), r"mine: rule 2: bits is 4.0, expected one of 4, 8, 16, 32$"),
    "text": (rule('tensors = "a"', 'bits = "4"'), r"mine: rule 2: bits is '4', expected one of 4, 8, 16, 32$"),
    "block": (
        rule('tensors = "a"', "block_size = 48"),
        r"mine: rule 2: block_size is 48, expected one of 16, 32, 64, 128, 256$",
    ),
    "zero point": (
        rule('tensors = "a"', "zero_point = 1"),
        r"mine: rule 2: zero_point is 1, expected one of true, false$",
    ),
    "codebook": (
        rule('tensors = "a"', 'codebook = "fp4"'),
        r"""mine: rule 2: codebook is 'fp4', expected one of "int", "nf4"$""",
    ),
    "method": (
        rule('tensors = "a"', 'method = "awq"'),
        r"""mine: rule 2: method is 'awq', expected one of "nearest", "search", "importance", "gptq", "best"$""",
    ),
    "no tensors": (
        rule("bits = 8"),
        r"mine: rule 2: tensors is None, expected a pattern or a list of patterns, such as",
    ),
    "empty list": (rule("tensors = []"), r"mine: rule 2: tensors is \[\], expected a pattern or a list"),
    "empty name": (rule('tensors = ["a", ""]'), r"mine: rule 2: tensors is \['a', ''\], expected a pattern or a list"),
    "number": (rule("tensors = 3"), r"mine: rule 2: tensors is 3, expected a pattern or a list"),
    "activations": (
        f'activations = "int4"\n{ALL_FOUR}',
        r"""mine: activations is 'int4', expected one of "int8", "float32"$""",
    ),
    "description": (f"description = 3\n{ALL_FOUR}", r"mine: description is 3, expected a text$"),
    "nothing": ("", r"""mine: holds no \[\[rule\]\]; one at least must give bits for tensors = "\*"$"""),
    "no list": ('[rule]\ntensors = "*"\nbits = 4\n', r"mine: holds no \[\[rule\]\]"),
    "no tables": ("rule = [1]", r"mine: holds no \[\[rule\]\]"),
    "no bits": (
        '[[rule]]\ntensors = "layers.*"\nbits = 4\n',
        r"""recipe mine: no rule gives the bits of token_table; add one for tensors = "\*"$""",
    ),
    "nf4 of 8 bits": (
        rule('tensors = "layers.*"', 'codebook = "nf4"', "bits = 8"),
        r"recipe mine: layers.0.mlp.down_proj: codebook nf4 has 4 bits, not 8$",
    ),
    "nf4 with zero points": (
        rule('tensors = "layers.*"', 'codebook = "nf4"', "zero_point = true"),
        r"recipe mine: layers.0.mlp.down_proj: codebook nf4 has no zero points$",
    ),
    "nf4 in small blocks": (
        rule('tensors = "layers.*"', 'codebook = "nf4"', "block_size = 16"),
        r"recipe mine: layers.0.mlp.down_proj: codebook nf4 has blocks of 32, 64, 128, 256, not 16$",
    ),
    "table with zero points": (
        rule('tensors = "ple_table"', "zero_point = true"),
        r"recipe mine: ple_table: a table is stored as symmetric integers or floats; give it codebook = \"int\" and "
        r"zero_point = false$",
    ),
    "table of nf4": (
        rule('tensors = "token_table"', 'codebook = "nf4"'),
        r"recipe mine: token_table: a table is stored as symmetric integers or floats",
    ),
    "broken": ("[[rule]\n", r"mine: not readable as TOML: .*line 1, column 7"),
    "twice": ("rule = []\nrule = []", r"mine: not readable as TOML: Cannot overwrite a value"),
    "deep": ("rule = " + "[" * 100_000, r"mine: not readable as TOML: maximum recursion depth exceeded"),
    "many digits": (f"rule = {'9' * 5000}", r"mine: not readable as TOML: Exceeds the limit"),
    "many hexadecimal digits": (
        rule('tensors = "a"', f"bits = 0x{'f' * 5000}"),
        r"mine: rule 2: bits is a number of thousands of digits, expected one of 4, 8, 16, 32$",
    ),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED)
def test_what_a_file_cannot_say(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        parse_recipe("mine", text)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_table_of_the_drafter_is_one() -> None:
    with pytest.raises(RecipeError, match="recipe mine: drafter.embed_tokens: a table is stored as symmetric"):
        recipe_of(Rule(("*",), bits=4, zero_point=True)).choose("drafter.embed_tokens")


@pytest.mark.parametrize("name", ["int5", "int4.toml", "", "a" * 200, "nul\0"])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(
        RecipeError, match=r"no such recipe or file; choose fp16, fp32, int4, .*, or a TOML file"
    ) as caught:
        read_recipe(name)
    assert str(caught.value).startswith(f"--recipe {name}: ")


def test_a_name_too_long_for_a_file() -> None:
    with pytest.raises(RecipeError, match="a{300}: cannot be read: File name too long"):
        read_recipe("a" * 300)


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=f"--recipe {tmp_path}: no such recipe or file"):
        read_recipe(str(tmp_path))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_bytes(b'description = "\xff"')
    with pytest.raises(RecipeError, match=f"{path}: not UTF-8 at byte 15; save it as UTF-8"):
        read_recipe(str(path))


def test_a_file_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(ALL_FOUR + "#" * (MAX_RECIPE_BYTES - len(ALL_FOUR)))
    assert read_recipe(str(path)).choose("m").form.bits == 4
    with path.open("a") as file:
        file.write("#")
    with pytest.raises(RecipeError, match=f"{path}: 1,048,577 bytes, a recipe has at most 1,048,576"):
        read_recipe(str(path))
