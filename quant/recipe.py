"""Recipes: which tensor gets which bits, in blocks of which size, by which method. TOML files that a user can edit.

A recipe is a list of rules. A rule names tensors by shell patterns and says what it changes for them; later rules win.
Names are those of the artifact's matrices: `layers.0.self_attn.qkv_proj`, `layers.0.mlp.gate_up_proj`, ...,
`per_layer_model_projection.0`, `token_table` (embeddings and output projection in one), `ple_table`, and those of the
drafter behind `drafter.`. `quant/recipes/` holds the recipes that come with the package.
"""

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, get_args

Activations = Literal["int8", "float32"]
Codebook = Literal["int", "nf4"]
Method = Literal["nearest", "search", "importance", "gptq", "best"]

CALIBRATED: tuple[Method, ...] = ("importance", "gptq", "best")
BITS = (4, 8, 16, 32)
BLOCK_SIZES = (16, 32, 64, 128, 256)
NF4_BLOCK_SIZES = (32, 64, 128, 256)  # those of bitsandbytes
NATIVE_BLOCK_SIZE = 32  # the native product takes blocks of this size and its multiples
TABLES = ("token_table", "ple_table")
DRAFTER = "drafter."
FOLDER = Path(__file__).parent / "recipes"
PLE_PROJECTIONS = ("layers.*.per_layer_*", "per_layer_model_projection.*")
MAX_RECIPE_BYTES = 1 << 20


class RecipeError(ValueError):
    """A recipe that cannot be read, or asks for what no graph can be emitted for."""


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a tensor is stored: `block_size` weights share a scale, 0 for floats of 16 and 32 bits."""

    bits: int
    block_size: int
    zero_point: bool = False
    codebook: Codebook = "int"

    @property
    def is_quantized(self) -> bool:
        """Whether codes and scales are stored instead of floats."""
        return self.bits < 16

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers, as all but NF4's are."""
        return self.is_quantized and self.codebook == "int"

    @property
    def allows_native(self) -> bool:
        """Whether the native product multiplies with it."""
        return self.is_integer and not self.zero_point and self.block_size % NATIVE_BLOCK_SIZE == 0

    def __str__(self) -> str:
        if not self.is_quantized:
            return f"float{self.bits}"
        kind = "nf4" if self.codebook == "nf4" else f"int{self.bits}"
        return f"{kind} in blocks of {self.block_size}{' with zero points' if self.zero_point else ''}"


@dataclass(frozen=True, slots=True)
class Choice:
    """What a recipe says of one tensor. `best` is GPTQ where there is a calibration text, else a scale search."""

    form: WeightFormat
    method: Method


@dataclass(frozen=True, slots=True)
class Rule:
    """What changes for tensors whose name one of the patterns matches; None where it stays."""

    tensors: tuple[str, ...]
    bits: int | None = None
    block_size: int | None = None
    zero_point: bool | None = None
    codebook: Codebook | None = None
    method: Method | None = None

    def matches(self, tensor: str) -> bool:
        """Whether the rule is about a tensor."""
        return any(fnmatchcase(tensor, pattern) for pattern in self.tensors)

    def changes(self) -> dict[str, Any]:
        """The keys that the rule gives."""
        given = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Recipe:
    """Rules for a target and its drafter. `activations` is the type that quantized products compute in."""

    name: str
    description: str
    activations: Activations
    rules: tuple[Rule, ...]

    def choose(self, tensor: str) -> Choice:
        """Storage and method of a tensor.

        Raises:
            RecipeError: the rules leave it without bits, or combine what does not go together.
        """
        found: dict[str, Any] = {"block_size": 32, "zero_point": False, "codebook": "int", "method": "best"}
        for rule in self.rules:
            if rule.matches(tensor):
                found |= rule.changes()
        if "bits" not in found:
            raise RecipeError(f'recipe {self.name}: no rule gives the bits of {tensor}; add one for tensors = "*"')
        form = WeightFormat(found["bits"], found["block_size"], found["zero_point"], found["codebook"])
        self._check(tensor, form)
        return Choice(form if form.is_quantized else WeightFormat(form.bits, 0), found["method"])

    def allows_native(self, tensors: Iterable[str]) -> bool:
        """Whether the native layout exists for these tensors; the PLE table is never multiplied with."""
        forms = (self.choose(tensor).form for tensor in tensors if tensor != "ple_table")
        return self.activations == "int8" and all(form.allows_native for form in forms)

    def calibrates(self, tensors: Iterable[str]) -> bool:
        """Whether a calibration text would change how one of these tensors is quantized."""
        choices = (self.choose(tensor) for tensor in tensors)
        return any(c.form.is_integer and c.method in CALIBRATED for c in choices)

    def with_rules(self, rules: Iterable[Rule], **changes: Any) -> "Recipe":
        """The same with more rules behind its own."""
        return replace(self, rules=(*self.rules, *rules), **changes)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the manifest."""
        rules = [{"tensors": list(rule.tensors), **rule.changes()} for rule in self.rules]
        return {"name": self.name, "description": self.description, "activations": self.activations, "rules": rules}

    def to_toml(self) -> str:
        """The recipe as a file that `read_recipe` reads."""
        lines = [f"description = {_toml(self.description)}", f"activations = {_toml(self.activations)}"]
        for rule in self.rules:
            keys = {"tensors": list(rule.tensors), **rule.changes()}
            lines += ["", "[[rule]]", *(f"{key} = {_toml(value)}" for key, value in keys.items())]
        return "\n".join(lines) + "\n"

    def _check(self, tensor: str, form: WeightFormat) -> None:
        if form.codebook == "nf4" and form.bits != 4:
            raise self._refused(tensor, f"codebook nf4 has 4 bits, not {form.bits}")
        if form.codebook == "nf4" and form.zero_point:
            raise self._refused(tensor, "codebook nf4 has no zero points")
        if form.codebook == "nf4" and form.block_size not in NF4_BLOCK_SIZES:
            known = ", ".join(map(str, NF4_BLOCK_SIZES))
            raise self._refused(tensor, f"codebook nf4 has blocks of {known}, not {form.block_size}")
        special = tensor in TABLES or tensor == f"{DRAFTER}embed_tokens"
        if special and (form.codebook == "nf4" or (form.zero_point and form.is_quantized)):
            reason = "a table is stored as symmetric integers or floats"
            raise self._refused(tensor, f'{reason}; give it codebook = "int" and zero_point = false')

    def _refused(self, tensor: str, reason: str) -> RecipeError:
        return RecipeError(f"recipe {self.name}: {tensor}: {reason}")


def make_recipe(bits: int, block_size: int = 32, activations: Activations = "int8") -> Recipe:
    """The recipe behind `--bits`: everything rounded to nearest, but PLE projections and the drafter never below 8.

    Raises:
        RecipeError: no graph can be emitted for the choice.
    """
    if bits not in BITS:
        raise RecipeError(f"--bits {bits}: choose one of {', '.join(map(str, BITS))}")
    if block_size not in BLOCK_SIZES:
        raise RecipeError(f"--block-size {block_size}: choose one of {', '.join(map(str, BLOCK_SIZES))}")
    if activations not in get_args(Activations):
        raise RecipeError(f"--activations {activations}: choose int8 or float32")
    rules = [Rule(("*",), bits=bits, block_size=block_size, method="nearest")]
    if bits < 8:
        rules.append(Rule((*PLE_PROJECTIONS, f"{DRAFTER}*"), bits=8))
    name = f"{bits} bits" + (f" in blocks of {block_size}" if bits < 16 else "")
    return Recipe(name, "every matrix alike", activations, tuple(rules))


def recipe_names() -> list[str]:
    """The recipes that come with the package."""
    return sorted(file.stem for file in FOLDER.glob("*.toml"))


def read_recipe(name: str) -> Recipe:
    """A recipe by its name, or from a TOML file by its path.

    Raises:
        RecipeError: there is none of that name, or the file is not a recipe; names the file and the key.
    """
    if name in recipe_names():
        return parse_recipe(name, (FOLDER / f"{name}.toml").read_text(encoding="utf-8"))
    path = Path(name)
    try:
        if not path.is_file():
            known = ", ".join(recipe_names())
            raise RecipeError(f"--recipe {name}: no such recipe or file; choose {known}, auto, or a TOML file")
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise RecipeError(f"{path}: {path.stat().st_size:,} bytes, a recipe has at most {MAX_RECIPE_BYTES:,}")
        return parse_recipe(str(path), path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start:,}; save it as UTF-8") from error
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from error


def parse_recipe(name: str, text: str) -> Recipe:
    """A recipe from TOML; RecipeError names what cannot be used."""
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # of numbers with too many digits it is a plain ValueError
        raise RecipeError(f"{name}: not readable as TOML: {' '.join(str(error).split())}") from error
    fields_ = _Table(content, name)
    fields_.refuse_others(("description", "activations", "rule"))
    activations = fields_.one_of("activations", get_args(Activations), "int8")
    rules = content.get("rule")
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, dict) for rule in rules):
        raise RecipeError(f'{name}: holds no [[rule]]; one at least must give bits for tensors = "*"')
    parsed = tuple(_rule(_Table(rule, f"{name}: rule {place}")) for place, rule in enumerate(rules, 1))
    recipe = Recipe(name, fields_.text("description", ""), activations, parsed)
    for tensor in ("layers.0.mlp.down_proj", *TABLES, f"{DRAFTER}pre_projection"):
        recipe.choose(tensor)
    return recipe


def _rule(table: "_Table") -> Rule:
    table.refuse_others([field.name for field in fields(Rule)])
    patterns = table.values.get("tensors")
    names = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise table.refused("tensors", 'a pattern or a list of patterns, such as "layers.*.mlp.*"')
    return Rule(
        tensors=tuple(names),
        bits=table.one_of("bits", BITS, None),
        block_size=table.one_of("block_size", BLOCK_SIZES, None),
        zero_point=table.one_of("zero_point", (True, False), None),
        codebook=table.one_of("codebook", get_args(Codebook), None),
        method=table.one_of("method", get_args(Method), None),
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """Typed access to a parsed table, with errors that name it."""

    values: Mapping[str, Any]
    where: str

    def refuse_others(self, known: Iterable[str]) -> None:
        if unknown := sorted(self.values.keys() - set(known)):
            raise RecipeError(f"{self.where}: unknown key {unknown[0]!r:.60}; known are {', '.join(known)}")

    def one_of(self, key: str, known: Iterable[Any], default: Any) -> Any:
        if key not in self.values:
            return default
        for value in known:
            if type(value) is type(self.values[key]) and value == self.values[key]:
                return value
        raise self.refused(key, f"one of {', '.join(map(_toml, known))}")

    def text(self, key: str, default: str) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str):
            raise self.refused(key, "a text")
        return " ".join(value.split())

    def refused(self, key: str, expected: str) -> RecipeError:
        return RecipeError(f"{self.where}: {key} is {_shown(self.values.get(key))}, expected {expected}")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    if isinstance(value, str):
        # TOML has JSON's escapes, and has one character more that must be escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value)


def _shown(value: Any) -> str:
    try:
        return f"{value!r:.60}"
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
