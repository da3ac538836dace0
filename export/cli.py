"""The export as a command: the options of `edge-export` and `optimum-cli export edge`, and what they run.

Imports nothing heavy before an export starts: optimum builds this parser whenever any of its commands starts.
"""

import argparse
import importlib.util
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from profiles import ProfileError
from profiles.amounts import amount_bytes
from quant.recipe import Recipe, RecipeError, make_recipe, read_recipe, recipe_names
from runtime.errors import EdgeError
from runtime.layout import LAYOUTS, Layout
from runtime.staging import terminate_as_interrupt
from runtime.strict_json import MANIFEST

if TYPE_CHECKING:
    from runtime.manifest import Manifest

NEEDED = ("torch", "safetensors", "onnx", "tqdm", "transformers", "bitsandbytes")
NEEDED_BY_OPTIMUM = ("optimum", "requests")
UNIFORM_OPTIONS = ("bits", "block_size", "activations")
DEFAULT_RECIPE, AUTO = "int4-mixed", "auto"
UNIFORM_BITS = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds SOURCE, OUT and the options."""
    parser.add_argument(
        "source", metavar="SOURCE", help="checkpoint folder, 'demo' (bundled), a hub id, or an artifact to convert"
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="artifact folder to make")
    parser.add_argument(
        "--layout",
        metavar="|".join(LAYOUTS),
        help="native: weights as the runtime's own operators read them, fast (default where bits, block size and "
        "activations allow it); portable: as stock onnxruntime reads them. An artifact as SOURCE is converted, to the "
        "bytes that an export in that layout makes",
    )
    parser.add_argument("--drafter", metavar="DIR", help="folder or hub id of the model's MTP assistant")
    parser.add_argument(
        "--recipe",
        metavar="NAME|FILE",
        help=f"which tensor gets which bits by which method: {', '.join(recipe_names())}, or a TOML file (default: "
        f"{DEFAULT_RECIPE})",
    )
    parser.add_argument("--max-bytes", metavar="N", help="with --recipe auto: bytes of all weights, such as 1.4GB")
    parser.add_argument("--max-kl", type=float, metavar="NATS", help="with --recipe auto: KL divergence on the text")
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        type=Path,
        help="a text such as the model is to write; lowers what rounding costs (the demo brings its own)",
    )
    parser.add_argument(
        "--evaluate",
        metavar="FILE",
        type=Path,
        help="then measure the artifact against SOURCE on this text, as edge-quality does; not the calibration's",
    )
    parser.add_argument("--bits", type=int, metavar="4|8|16|32", help="no recipe: all weights alike, to nearest")
    parser.add_argument("--block-size", type=int, metavar="N", help="with --bits: weights to a scale (default: 32)")
    parser.add_argument(
        "--activations",
        metavar="int8|float32",
        help="with --bits: what 4- and 8-bit products compute in (default: int8; float32 is slow and exact)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def export(options: argparse.Namespace, *, through_optimum: bool = False) -> Path | None:
    """Runs the export that parsed options describe, directly or as optimum's exporter, or the conversion.

    The text to evaluate on is checked; `edge.export_cli` evaluates, as that takes the runtime.

    Returns:
        The checkpoint's folder; None after a conversion.

    Raises:
        EdgeError: an option, the source or the destination cannot be used.
    """
    is_conversion = os.path.lexists(Path(options.source) / MANIFEST)
    with terminate_as_interrupt():
        if is_conversion:
            checkpoint, manifest = None, _convert(options)
        else:
            checkpoint, manifest = _export(options, through_optimum=through_optimum)
    size = sum(entry.size_bytes for entry in manifest.files.values())
    drafting = "with drafter" if manifest.drafter else "without drafter"
    hint = "" if manifest.drafter or is_conversion else " (pass --drafter for speed)"
    stored = f"{manifest.recipe.get('name', 'no recipe')}, {manifest.layout}"
    print(f"{options.output}: {size / 1e6:,.1f} MB, {stored}, {drafting}{hint}")
    return checkpoint


def _export(options: argparse.Namespace, *, through_optimum: bool) -> tuple[Path, "Manifest"]:
    """Exports SOURCE, a checkpoint, and returns its folder too."""
    check_installed(NEEDED + NEEDED_BY_OPTIMUM if through_optimum else NEEDED)
    from export.calibration import LEAST_TOKENS, token_windows
    from export.pipeline import export_artifact, open_source
    from export.source import bundled_calibration, resolve_source

    if through_optimum:
        from export.optimum_backend import export_artifact
    recipe, layout = _recipe(options), _layout(options)
    target, drafter = resolve_source(options.source, options.drafter)
    source = open_source(target, drafter)
    if options.evaluate is not None:
        token_windows(source.target, source.model, options.evaluate, LEAST_TOKENS)  # refused here, not after minutes
    calibration = options.calibration
    if calibration is None and _calibrates(recipe, source.matrix_names()):
        calibration = bundled_calibration(target)
    if recipe is None:
        from export.automix import auto_recipe

        max_bytes = None if options.max_bytes is None else _bytes(options.max_bytes)
        if calibration is None:
            raise EdgeError("--recipe auto measures on a text; pass --calibration FILE, such as the model is to write")
        recipe = auto_recipe(
            source, calibration, max_bytes=max_bytes, max_kl=options.max_kl, show_progress=not options.quiet
        )
    manifest = export_artifact(
        source, options.output, recipe, layout=layout, calibration=calibration, show_progress=not options.quiet
    )
    return target, manifest


def _calibrates(recipe: Recipe | None, tensors: list[str]) -> bool:
    """Whether a text would be used; `auto`, None here, measures on it."""
    try:
        return recipe is None or recipe.calibrates(tensors)
    except RecipeError as error:
        raise EdgeError(str(error)) from error


def _bytes(text: str) -> int:
    try:
        return amount_bytes(text, "--max-bytes")
    except ProfileError as error:
        raise EdgeError(str(error)) from error


def _recipe(options: argparse.Namespace) -> Recipe | None:
    """The recipe that options ask for; None for `auto`, which measures first."""
    limits = [name for name in ("max_bytes", "max_kl") if getattr(options, name) is not None]
    if (options.recipe == AUTO) != (len(limits) == 1):
        raise EdgeError("--recipe auto goes with one limit, --max-bytes or --max-kl, and these with --recipe auto")
    if options.max_kl is not None and not 0 < options.max_kl < math.inf:
        raise EdgeError(f"--max-kl {options.max_kl:g}: expected nats above 0, such as 0.02")
    given = {name: value for name in UNIFORM_OPTIONS if (value := getattr(options, name)) is not None}
    try:
        if not given and options.recipe == AUTO:
            return None
        if not given:
            return read_recipe(options.recipe or DEFAULT_RECIPE)
        if options.recipe is not None:
            option = f"--{next(iter(given)).replace('_', '-')}"
            raise EdgeError(f"{option} and --recipe exclude each other; write it into a copy of the recipe's TOML file")
        return make_recipe(**({"bits": UNIFORM_BITS} | given))
    except RecipeError as error:
        raise EdgeError(str(error)) from error


def _convert(options: argparse.Namespace) -> "Manifest":
    """Converts SOURCE, an artifact."""
    from runtime.convert import convert_artifact

    for name in ("drafter", "recipe", "max_bytes", "max_kl", "calibration", "evaluate", *UNIFORM_OPTIONS):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise EdgeError(f"{option}: {options.source} is an artifact, only --layout can change; export a checkpoint")
    layout = _layout(options)
    if layout is None:
        raise EdgeError(f"{options.source} is an artifact; say what to convert it to: --layout {' or '.join(LAYOUTS)}")
    return convert_artifact(Path(options.source), options.output, layout)


def _layout(options: argparse.Namespace) -> Layout | None:
    if options.layout is None:
        return None
    for layout in LAYOUTS:
        if options.layout == layout:
            return layout
    raise EdgeError(f"--layout {options.layout}: choose {' or '.join(LAYOUTS)}")


def check_installed(modules: tuple[str, ...] = NEEDED) -> None:
    """Raises EdgeError where packages of the extra `export` are missing."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise EdgeError(f"{', '.join(missing)} not installed; run: pip install 'gemma-edge[export]'")
