"""Artifacts of a real model's size with random weights: they tell speed and memory, not text.

The real export writes them from a source that makes its weights up, so they are what an export makes. They are kept in
the user's cache and found there again as long as the options, the format and the exporter's own code are the same.
"""

import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint import CHUNK_WEIGHTS, Checkpoint, Float32, Indices, TensorEntry
from export.errors import ExportError
from export.graph import Array
from export.hf_config import drafter_config, generation_defaults, model_config
from export.linear import Matrix
from export.pipeline import Source, export_artifact
from export.released import ReleasedModel
from export.source import DEMO_FOLDER
from export.text_files import TOKENIZER
from quant.blockwise import BlockFormat, Blocks
from quant.recipe import Recipe
from runtime.errors import ArtifactError
from runtime.layout import Layout
from runtime.manifest import FORMAT_VERSION, MANIFEST, check_files, read_manifest
from runtime.model_config import DrafterConfig, LayerConfig, ModelConfig, StackConfig
from runtime.verified_cache import user_cache_folder

PREFIX = "model."
ALPHABET = [chr(0xE000 + letter) for letter in range(64)]  # private use: no text has these, so none is cut differently
POOL_BYTES = 4 * CHUNK_WEIGHTS
# by byte: 0.5 to 1.5, of either sign, as quantized blocks have them; equal signs would shift all sums one way
SCALES = ((0.5 + np.arange(256) / 256) * np.where(np.arange(256) % 2, 1, -1)).astype(np.float32)
STRIDE = 0x9E3779B1  # odd and irregular: places in a pool do not repeat
CODE = (
    "export/*.py",
    "quant/*.py",
    "runtime/manifest.py",
    "runtime/matrix_spec.py",
    "runtime/panels.py",
    "runtime/signature.py",
    "runtime/model_config.py",
)
UNUSED_SECONDS = 24 * 3600.0


def dummy_artifact(
    dummy: ReleasedModel, recipe: Recipe, *, layout: Layout | None = None, show_progress: bool = True
) -> Path:
    """The folder of an artifact with random weights in the user's cache; made where it is not there yet.

    Raises:
        ExportError: there is no cache folder, the artifact cannot be written, or the recipe has not the layout.
    """
    cache = user_cache_folder()
    if cache is None:
        raise ExportError("no cache folder: this user has no home; set XDG_CACHE_HOME to a folder for the artifact")
    root = cache / "dummy"
    folder = root / f"{dummy.name}-{_key(dummy, recipe, layout)}"
    if not _is_usable(folder):
        try:
            root.mkdir(parents=True, exist_ok=True)
            _remove_unused(root)
        except OSError as error:
            raise ExportError(f"{error.filename or root}: {error.strerror}; set XDG_CACHE_HOME to a folder") from error
        if folder.exists():
            shutil.rmtree(folder)
        write_dummy(dummy, folder, recipe, layout=layout, show_progress=show_progress)
    os.utime(folder)
    return folder


def write_dummy(
    dummy: ReleasedModel, destination: Path, recipe: Recipe, *, layout: Layout | None = None, show_progress: bool = True
) -> None:
    """Exports random weights to `destination`, as an export of a checkpoint of this shape would."""
    with tempfile.TemporaryDirectory(prefix="gemma-edge-dummy-") as name:
        target, assistant = Path(name) / "target", Path(name) / "assistant"
        for folder, config in ((target, dummy.target), (assistant, dummy.assistant)):
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        (target / TOKENIZER).write_text(json.dumps(_tokenizer(dummy.target["vocab_size"])), encoding="utf-8")
        export_artifact(
            _source(dummy, target, assistant), destination, recipe, layout=layout, show_progress=show_progress
        )


def _source(dummy: ReleasedModel, target: Path, assistant: Path) -> Source:
    model = model_config(dummy.target, dummy.name)
    return RandomSource(
        target=RandomCheckpoint(target, target_shapes(model)),
        model=model,
        prefix=PREFIX,
        generation=generation_defaults({}, model, dummy.name),
        drafter=RandomCheckpoint(assistant, drafter_shapes(drafter_config(dummy.assistant, model, dummy.name))),
        drafter_config=drafter_config(dummy.assistant, model, dummy.name),
    )


class RandomCheckpoint(Checkpoint):
    """A checkpoint folder without weight files: tensors of the given shapes, made up when they are read.

    Matrices have rows of norm 1, norm weights and scalars are 1. Every chunk is cut from one pool at another place, so
    that no two matrices are equal: onnxruntime keeps equal packed weights once, which would flatter memory and speed.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Reads the folder's config.json; `shapes` by the tensors' full names."""
        self.folder = folder
        self.config = self.read_json("config.json")
        self.weight_files = []
        place = folder / "random"
        self._tensors = {
            name: TensorEntry(place, shape, "I64" if name.endswith("token_ordering") else "BF16")
            for name, shape in shapes.items()
        }
        rng = np.random.default_rng(0)
        self._pool = np.frombuffer(rng.bytes(POOL_BYTES), np.uint8)
        self._num_cuts = 0

    def rows(self, name: str, start: int, stop: int) -> Iterator[Float32]:
        """Rows [start, stop) of a matrix as float32 chunks [num_rows, width]."""
        width = self.shape(name)[-1]
        step = max(1, CHUNK_WEIGHTS // width)
        for first in range(start, stop, step):
            yield self._floats_of(min(step, stop - first), width)

    def rows_in_order(self, name: str, order: Indices) -> Iterator[Float32]:
        """As `rows`; random rows in another order are random rows."""
        yield from self.rows(name, 0, len(order))

    def vector(self, name: str, size: int) -> Float32:
        """Ones [size]."""
        assert self.shape(name) == (size,), f"{name}: {self.shape(name)}, expected {size}"
        return np.ones(size, np.float32)

    def indices(self, name: str, size: int) -> Indices:
        """A permutation of `size` numbers."""
        return np.random.default_rng(zlib.crc32(name.encode())).permutation(size)

    def codes(self, num_rows: int, form: BlockFormat) -> Blocks:
        """Random codes and scales for weights of that variance, without the cost of quantizing."""
        codes = self._cut(num_rows * form.row_bytes).reshape(num_rows, form.row_bytes)
        # codes are uniform: of n values around 0, their root mean square is n / sqrt(12)
        size = 12**0.5 / (1 << form.bits) * form.width**-0.5
        spread = self._cut(num_rows * form.num_blocks).reshape(num_rows, form.num_blocks)
        return Blocks(codes, (SCALES * np.float32(size)).astype(np.float16)[spread])

    def _floats_of(self, num_rows: int, width: int) -> Float32:
        """Values of zero mean and variance 1 / width."""
        values = self._cut(num_rows * width).reshape(num_rows, width) - np.float32(127.5)
        values *= np.float32(12**0.5 / 256 * width**-0.5)
        return values

    def _cut(self, num_bytes: int) -> npt.NDArray[np.uint8]:
        self._num_cuts += 1
        first = self._num_cuts * STRIDE % (POOL_BYTES - num_bytes)
        return self._pool[first : first + num_bytes]


class RandomQuantizer:
    """Makes codes up; what they cost is nothing that could be told."""

    def blocks(self, matrix: Matrix, form: BlockFormat) -> Iterator[Blocks]:
        """Random codes for the matrix's rows."""
        assert isinstance(matrix.checkpoint, RandomCheckpoint)
        step = max(1, CHUNK_WEIGHTS // matrix.width)
        for first in range(0, matrix.num_rows, step):
            yield matrix.checkpoint.codes(min(step, matrix.num_rows - first), form)

    def nf4(self, matrix: Matrix, block_size: int) -> Iterator[tuple[Array, Array]]:
        """Refused: no dummy has NF4."""
        raise ExportError(f"{matrix.name}: random weights are made as integers or floats only")

    def tensors(self) -> dict[str, dict[str, Any]]:
        """Nothing."""
        return {}


@dataclass(frozen=True, slots=True)
class RandomSource(Source):
    """A source of random weights."""

    def quantizer(self, recipe: Recipe, calibration: Path | None) -> RandomQuantizer:
        """What makes its codes up."""
        return RandomQuantizer()


def target_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the target's tensors by name; layers that share KV have no k and v."""
    size, ple_width = model.hidden_size, len(model.layers) * model.ple_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (model.vocab_size, size),
        "embed_tokens_per_layer.weight": (model.vocab_size, ple_width),
        "per_layer_model_projection.weight": (ple_width, size),
        "per_layer_projection_norm.weight": (model.ple_size,),
        "norm.weight": (size,),
    }
    for index, layer in enumerate(model.layers):
        own = _layer_shapes(model, layer, owns_kv=layer.kv_source == index) | {
            "per_layer_input_gate.weight": (model.ple_size, size),
            "per_layer_projection.weight": (size, model.ple_size),
            "post_per_layer_input_norm.weight": (size,),
        }
        shapes |= {f"layers.{index}.{name}": shape for name, shape in own.items()}
    return {f"{PREFIX}{name}": shape for name, shape in shapes.items()}


def drafter_shapes(drafter: DrafterConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the assistant's tensors by name."""
    size, backbone = drafter.hidden_size, drafter.backbone_hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (drafter.vocab_size, size),
        "model.norm.weight": (size,),
        "pre_projection.weight": (size, 2 * backbone),
        "post_projection.weight": (backbone, size),
        "masked_embedding.centroids.weight": (drafter.num_centroids, size),
        "masked_embedding.token_ordering": (drafter.vocab_size,),
    }
    for index, layer in enumerate(drafter.layers):
        own = _layer_shapes(drafter, layer, owns_kv=False)
        shapes |= {f"model.layers.{index}.{name}": shape for name, shape in own.items()}
    return shapes


def _layer_shapes(stack: StackConfig, layer: LayerConfig, *, owns_kv: bool) -> dict[str, tuple[int, ...]]:
    size, width, dim = stack.hidden_size, layer.intermediate_size, layer.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (stack.num_heads * dim, size),
        "self_attn.o_proj.weight": (size, stack.num_heads * dim),
        "self_attn.q_norm.weight": (dim,),
        "mlp.gate_proj.weight": (width, size),
        "mlp.up_proj.weight": (width, size),
        "mlp.down_proj.weight": (size, width),
        "layer_scalar": (1,),
    }
    for norm in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes[f"{norm}_layernorm.weight"] = (size,)
    if owns_kv:
        shapes |= {f"self_attn.{part}_proj.weight": (layer.num_kv_heads * dim, size) for part in "kv"}
        shapes["self_attn.k_norm.weight"] = (dim,)
    return shapes


def _tokenizer(vocab_size: int) -> dict[str, Any]:
    """The demo's tokenizer, filled up to as many tokens and merges as the model's own has: they take time to load."""
    content: dict[str, Any] = json.loads((DEMO_FOLDER / "target" / TOKENIZER).read_text(encoding="utf-8"))
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    first = len(vocabulary)
    letters = ("".join(word) for length in (1, 2, 3) for word in product(ALPHABET, repeat=length))
    tokens = list(islice(letters, max(vocab_size - first, 0)))
    vocabulary |= {token: first + place for place, token in enumerate(tokens)}
    merges += [[token[:-1], token[-1]] for token in tokens if len(token) > 1]
    merges += [[token[0], token[1:]] for token in tokens if len(token) > 2]
    return content


def _key(dummy: ReleasedModel, recipe: Recipe, layout: Layout | None) -> str:
    """Stands for all that the artifact depends on: sizes, recipe, format, and the code that writes it."""
    choice = [dict(dummy.target), dict(dummy.assistant), recipe.to_json(), layout, FORMAT_VERSION]
    digest = hashlib.sha256(json.dumps(choice).encode())
    root = Path(__file__).parents[1]
    for file in sorted(file for pattern in CODE for file in root.glob(pattern)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _is_usable(folder: Path) -> bool:
    try:
        check_files(folder, read_manifest(folder))
    except ArtifactError:
        return False
    return True


def _remove_unused(root: Path) -> None:
    """Removes artifacts that nobody has asked for in a day: of other options or older code, gigabytes each."""
    for folder in root.iterdir():
        is_ours = (folder / MANIFEST).exists() or folder.name.endswith(".partial")  # of an export that was killed
        if is_ours and time.time() - folder.stat().st_mtime > UNUSED_SECONDS:
            shutil.rmtree(folder)
