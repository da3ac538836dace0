"""Random walks under the masks give what the schema accepts; masks, `num_allowed` and `consume` say the same."""

import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from runtime.errors import ArtifactError, InferenceError, RequestError
from runtime.grammar import MAX_LENGTH, Grammar, choice, json_object, json_schema, lark, regex
from runtime.grammar_compiler import GrammarCompiler, GrammarConstraint
from runtime.tokenizer import Tokenizer
from tests.json_schemas import random_schemas

TOKENIZER = Path(__file__).parents[2] / "export/demo/checkpoint/target/tokenizer.json"
VOCAB_SIZE, EOS_IDS = 2048, (1, 5)
NUM_SPECIAL = 16
SCHEMAS = list(random_schemas(240, seed=66))


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER.read_text(encoding="utf-8"), VOCAB_SIZE, EOS_IDS)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(TOKENIZER, bos_token_id=2)


@pytest.fixture(scope="module")
def closing(tokenizer: Tokenizer) -> frozenset[int]:
    """Tokens that end something, which a walk prefers so that it ends itself."""
    return frozenset(id_ for id_ in range(VOCAB_SIZE) if tokenizer.decode([id_])[:1] in tuple('"}],'))


def mask_of(constraint: GrammarConstraint) -> np.ndarray:
    (mask,) = constraint.masks([])
    assert mask is not None
    return mask


def walk(constraint: GrammarConstraint, rng: random.Random, closing: frozenset[int], most: int = 600) -> list[int]:
    """Random allowed tokens up to the end, more and more of those that end something."""
    ids: list[int] = []
    while len(ids) < most:
        allowed = np.flatnonzero(mask_of(constraint)).tolist()
        ends = [id_ for id_ in allowed if id_ in EOS_IDS] or [id_ for id_ in allowed if id_ in closing]
        ids.append(rng.choice(ends if ends and rng.random() < 0.3 + len(ids) / most else allowed))
        constraint.consume(ids[-1:])
        if ids[-1] in EOS_IDS:
            return ids
        assert not set(np.flatnonzero(mask_of(constraint)).tolist()) & (set(range(NUM_SPECIAL)) - set(EOS_IDS))
    raise AssertionError("the walk did not end")


@pytest.mark.parametrize("index", range(len(SCHEMAS)))
def test_walks_give_documents_of_the_schema(
    compiler: GrammarCompiler, tokenizer: Tokenizer, closing: frozenset[int], index: int
) -> None:
    rng = random.Random(index)
    for _ in range(3):
        constraint = compiler.compile(json_schema(SCHEMAS[index]))
        text = tokenizer.decode(walk(constraint, rng, closing))
        document = json.loads(text)
        jsonschema.validate(document, SCHEMAS[index], jsonschema.Draft202012Validator)
        assert "\ufffd" not in text


def test_the_schemas_are_many_and_of_every_kind() -> None:
    assert len({json.dumps(schema) for schema in SCHEMAS}) >= 200
    text = json.dumps(SCHEMAS)
    keywords = ("anyOf", "enum", "const", "pattern", "minLength", "maxItems", "minimum", "required", "prefixItems")
    assert all(f'"{keyword}"' in text for keyword in keywords)


@pytest.mark.parametrize("index", range(0, len(SCHEMAS), 8))
def test_asking_ahead_is_going_there(compiler: GrammarCompiler, closing: frozenset[int], index: int) -> None:
    grammar = json_schema(SCHEMAS[index])
    rng = random.Random(index)
    ids = [*walk(compiler.compile(grammar), rng, closing), EOS_IDS[0]]
    step_by_step = [compiler.compile(grammar) for _ in range(len(ids) + 1)]
    for place, fresh in enumerate(step_by_step):
        fresh.consume(ids[:place])
    constraint = compiler.compile(grammar)
    place = 0
    while place < len(ids):
        ahead = ids[place : place + rng.randrange(1, 8)]
        before = mask_of(constraint)
        for mask, fresh in zip(constraint.masks(ahead), step_by_step[place:], strict=False):
            assert np.array_equal(mask, mask_of(fresh))
        assert constraint.num_allowed(ahead) == len(ahead)
        assert np.array_equal(mask_of(constraint), before)
        place += (num := rng.randrange(1, len(ahead) + 1))
        constraint.consume(ahead[:num])
    assert constraint.is_complete
    assert np.flatnonzero(mask_of(constraint)).tolist() == list(EOS_IDS)


@pytest.mark.parametrize("index", range(0, len(SCHEMAS), 8))
def test_num_allowed_is_the_longest_prefix_in_the_masks(
    compiler: GrammarCompiler, closing: frozenset[int], index: int
) -> None:
    grammar, rng = json_schema(SCHEMAS[index]), random.Random(index)
    ids = [*walk(compiler.compile(grammar), rng, closing), *EOS_IDS]
    for place in rng.choices(range(len(ids)), k=10):
        drafts = ids[place : place + 6]
        wrong = rng.randrange(len(drafts))
        drafts[wrong] = rng.choice([rng.randrange(-2, VOCAB_SIZE + 2), rng.randrange(NUM_SPECIAL)])
        constraint = compiler.compile(grammar)
        constraint.consume(ids[:place])
        assert constraint.num_allowed(drafts) == longest_prefix(constraint, drafts)


def longest_prefix(constraint: GrammarConstraint, drafts: Sequence[int]) -> int:
    for position, draft in enumerate(drafts):
        mask = constraint.masks(drafts[:position])[-1]
        assert mask is not None
        if not (0 <= draft < len(mask) and mask[draft]):
            return position
    return len(drafts)


def byte_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """`text` a byte at a time, which every grammar takes."""
    by_name = {tokenizer.token(id_): id_ for id_ in range(VOCAB_SIZE)}
    return [by_name[f"<0x{byte:02X}>"] for byte in text.encode()]


@pytest.fixture(scope="module")
def accepts(compiler: GrammarCompiler, tokenizer: Tokenizer) -> Callable[[Grammar, str], bool]:
    def accepts(grammar: Grammar, text: str) -> bool:
        ids = [*byte_tokens(tokenizer, text), EOS_IDS[1]]
        return compiler.compile(grammar).num_allowed(ids) == len(ids)

    return accepts


def test_white_space_is_bounded(accepts: Callable[[Grammar, str], bool]) -> None:
    for text in ('{"a":1}', '{"a": 1}', '{\n  "a": [\n    1,\n    2\n  ]\n}', "{}"):
        assert accepts(json_object(), text)
    for text in ('{"a":  1}', '{"a":\n\n1}', '{"a":\n' + " " * 33 + "1}", '{"a":\t1}', ' {"a":1}', '{"a":1}\n', "[]"):
        assert not accepts(json_object(), text)


def test_a_choice_is_word_for_word(accepts: Callable[[Grammar, str], bool]) -> None:
    texts = ["red", 'a"b', "\\", "\n\t", "é😀", "<|turn>", "a/b", "\x00\x01\x7f", "%json", "\u2028", "a.b"]
    for text in texts:
        assert accepts(choice(texts), text)
        assert accepts(choice([text]), text)
    for text in ("", "redd", "re", "axb", "a"):
        assert not accepts(choice(texts), text)
    assert accepts(choice([f"choice {number}" for number in range(10_000)]), "choice 17")


def test_regex_and_lark(accepts: Callable[[Grammar, str], bool]) -> None:
    assert accepts(regex(r"a/b\/[0-9]+"), "a/b/42")
    assert accepts(regex("a\nb c"), "a\nb c")
    assert not accepts(regex("a+"), "aab")
    grammar = lark('start: "(" start ")" | NAME\nNAME: /[a-z]+/')
    assert accepts(grammar, "((abc))")
    assert not accepts(grammar, "((abc)")


def test_a_grammar_is_complete_where_only_an_end_can_follow(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(regex("ab?"))
    assert not constraint.is_complete
    constraint.consume(byte_tokens(tokenizer, "a"))
    assert not constraint.is_complete
    assert mask_of(constraint)[list(EOS_IDS)].all()
    constraint.consume(byte_tokens(tokenizer, "b"))
    assert constraint.is_complete


def test_tokens_that_the_tokenizer_lacks_are_never_allowed(closing: frozenset[int]) -> None:
    compiler = GrammarCompiler(TOKENIZER.read_text(encoding="utf-8"), VOCAB_SIZE + 77, EOS_IDS)
    constraint = compiler.compile(regex("(.|\n)*"))
    mask = mask_of(constraint)
    assert mask.shape == (VOCAB_SIZE + 77,)
    assert not mask[VOCAB_SIZE:].any()
    assert mask[NUM_SPECIAL:VOCAB_SIZE].mean() > 0.9  # single bytes of a longer character are not
    assert constraint.num_allowed([VOCAB_SIZE]) == 0


def test_the_longest_string_that_may_be_bounded_can_be_filled(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(json_schema({"type": "string", "minLength": 4000, "maxLength": MAX_LENGTH}))
    quote, *letters = byte_tokens(tokenizer, '"' + "a" * MAX_LENGTH)
    constraint.consume([quote])
    for letter in letters:
        assert mask_of(constraint)[letter]
        constraint.consume([letter])
    assert constraint.num_allowed(letters[:1]) == 0
    assert constraint.num_allowed([quote, *EOS_IDS]) == 3


def test_special_tokens_of_a_lark_grammar_are_not_allowed(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    constraint = compiler.compile(lark('start: "a" <|turn> "b"'))
    a = byte_tokens(tokenizer, "a")
    assert constraint.num_allowed([*a, 4]) == 1
    constraint.consume(a)
    with pytest.raises(InferenceError, match="the grammar fails behind 1 tokens: no token of text can follow"):
        constraint.masks([])


def test_a_token_that_is_not_allowed_cannot_be_consumed(compiler: GrammarCompiler, tokenizer: Tokenizer) -> None:
    for token_id in (EOS_IDS[0], 4, VOCAB_SIZE):
        constraint = compiler.compile(regex("ab"))
        with pytest.raises(InferenceError, match=f"fails behind 1 tokens: token {token_id} is not allowed here"):
            constraint.consume([*byte_tokens(tokenizer, "a"), token_id])
    constraint = compiler.compile(regex("ab"))
    with pytest.raises(InferenceError, match="the grammar fails behind 0 tokens: .*"):
        constraint.consume(byte_tokens(tokenizer, "b"))


UNSUPPORTED = ["uniqueItems", "contains", "not", "if", "dependentRequired", "propertyNames", "unevaluatedProperties"]
REFUSED = [
    *((json_schema({key: True}), rf'Unimplemented keys: \["{key}"\]') for key in UNSUPPORTED),
    (json_schema({"items": {"x-guidance": {"lenient": True}, "not": {}}}), 'Unimplemented keys: \\["not"\\]'),
    (json_schema({"type": "string", "pattern": "(?!a)b"}), "look-around, including look-ahead .* is not supported"),
    (json_schema({"type": "string", "pattern": r"(a)\1"}), "backreferences are not supported"),
    (json_schema({"type": "string", "format": "regex"}), "Unknown format: regex"),
    (json_schema({"type": "foo"}), "Invalid type: foo"),
    (json_schema({"$ref": "#/nope"}), "Pointer '/nope' does not exist"),
    (json_schema({"$schema": "http://example.org/x"}), "is not present in a registry"),
    (json_schema({"enum": []}), "Unsatisfiable schema"),
    (json_schema({"$ref": "#"}), "NoExtensionBias"),
    (json_schema({"allOf": [{"$ref": "#"}, {"type": "string"}]}), "circular references with sibling keys"),
    (regex("(?=a)b"), "look-around"),
    (regex("(" * 16_000 + ")" * 16_000), r"invalid regex .*\.\.\.; change or simplify it"),
    (lark("start: foo"), 'unknown name: "foo"'),
    (lark("start: " + "(" * 16_000), "too deeply nested"),
    (lark("begin: 'a'"), "the grammar does not compile: .*; change or simplify it"),
    (lark("start: A\nA: " + " & ".join(f"/.*{chr(97 + index)}.*/" for index in range(20))), "lexer|limit"),
]


@pytest.mark.parametrize(("grammar", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_cannot_be_enforced_is_refused_on_one_line(
    compiler: GrammarCompiler, grammar: Grammar, message: str
) -> None:
    start = time.perf_counter()
    with pytest.raises(RequestError, match=message) as caught:
        compiler.compile(grammar)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 280
    assert time.perf_counter() - start < 5  # a tenth of that alone on a machine


def chain(count: int) -> dict[str, Any]:
    links = {
        f"a{index}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{index + 1}"}}}
        for index in range(count)
    }
    return {"$defs": {**links, f"a{count}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def nested_any_of(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        schema = {"anyOf": [schema, {"type": "integer"}]}
    return schema


COSTLY = {
    "a long chain of references": json_schema(chain(1600)),
    "a long chain of rules": lark("start: a0\n" + "".join(f"a{n}: a{n + 1}\n" for n in range(2400)) + 'a2400: "x"'),
    "a long chain of terminals": lark("start: A0\n" + "".join(f"A{n}: A{n + 1}\n" for n in range(2400)) + 'A2400: "x"'),
    "nested anyOf": json_schema(nested_any_of(30)),
    "a large enum": json_schema({"enum": [f"value {number}" for number in range(10_000)]}),
    "many properties": json_schema({"properties": {f"p{number}": {"type": "integer"} for number in range(512)}}),
    "many joined patterns": json_schema({"allOf": [{"pattern": f".*{chr(97 + n)}.*"} for n in range(12)]}),
    "a tree": json_schema({"type": "object", "properties": {"l": {"$ref": "#"}, "r": {"$ref": "#"}}}),
    "a large multiple": json_schema({"type": "integer", "multipleOf": 99_991}),
    "patterns of names": json_schema({"patternProperties": {f"^{n:03}x": {"type": "integer"} for n in range(32)}}),
    "optional letters": regex("(a?){1000}a{1000}"),
    "nested counts": regex("((a{1000}){1000}){1000}"),
    "an exponential automaton": regex("(a|b)*a(a|b){200}"),
    "an ambiguous grammar": lark('start: s\ns: s s s | "a" | '),
    "doubling": lark("start: a0\n" + "".join(f"a{n}: a{n + 1} a{n + 1}\n" for n in range(40)) + 'a40: "x" | '),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_grammar_is_served_or_refused_in_time(
    compiler: GrammarCompiler, closing: frozenset[int], name: str
) -> None:
    start = time.perf_counter()
    try:
        constraint, rng = compiler.compile(COSTLY[name]), random.Random(0)
        for _ in range(10):
            constraint.consume([rng.choice(np.flatnonzero(mask_of(constraint)).tolist())])
    except (RequestError, InferenceError) as error:
        assert "\n" not in str(error)
    assert time.perf_counter() - start < 5  # 0.6 s alone on a machine


def test_a_missing_llguidance_is_named(compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(RequestError, match=r"^structured output needs llguidance; install gemma-edge\[constrain\]$"):
        compiler.compile(json_object())


@pytest.mark.parametrize("text", ["{}", "[]", "", "/etc/passwd", '{"decoder": null}'])
def test_what_is_no_tokenizer_is_named(text: str) -> None:
    with pytest.raises(ArtifactError, match="tokenizer.json: no grammar can read its tokens: .*; export a Gemma"):
        GrammarCompiler(text, VOCAB_SIZE, EOS_IDS).compile(json_object())
