"""The export as a command: the options of `edge-export` and `optimum-cli export edge`, and what they run.

Imports nothing heavy before an export starts: optimum builds this parser whenever any of its commands starts.
"""

import argparse
import importlib.util
from pathlib import Path

from runtime.errors import EdgeError

NEEDED = ("torch", "safetensors", "onnx", "tqdm")
NEEDED_BY_OPTIMUM = ("transformers", "optimum", "requests")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds SOURCE, OUT and the options."""
    parser.add_argument("source", metavar="SOURCE", help="checkpoint folder, 'demo' (bundled) or a hub id")
    parser.add_argument("output", metavar="OUT", type=Path, help="artifact folder to make")
    parser.add_argument("--drafter", metavar="DIR", help="folder or hub id of the model's MTP assistant")
    parser.add_argument("--bits", type=int, default=4, metavar="4|8|16|32", help="bits of a weight (default: 4)")
    parser.add_argument(
        "--block-size", type=int, default=32, metavar="N", help="weights that share a scale (default: 32)"
    )
    parser.add_argument(
        "--activations",
        default="int8",
        metavar="int8|float32",
        help="what 4- and 8-bit products compute in (default: int8; float32 is slow and exact)",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def export(options: argparse.Namespace, *, through_optimum: bool = False) -> None:
    """Runs the export that parsed options describe, directly or as the exporter that optimum's TasksManager names.

    Raises:
        EdgeError: an option, the source or the destination cannot be used.
    """
    _check_installed(NEEDED + NEEDED_BY_OPTIMUM if through_optimum else NEEDED)
    from export.pipeline import export_artifact, open_source
    from export.source import resolve_source
    from export.staging import terminate_as_interrupt
    from quant.recipe import RecipeError, make_recipe

    if through_optimum:
        from export.optimum_backend import export_artifact
    try:
        recipe = make_recipe(options.bits, options.block_size, options.activations)
    except RecipeError as error:
        raise EdgeError(str(error)) from error
    with terminate_as_interrupt():
        target, drafter = resolve_source(options.source, options.drafter)
        manifest = export_artifact(
            open_source(target, drafter), options.output, recipe, show_progress=not options.quiet
        )
    size = sum(entry.size_bytes for entry in manifest.files.values())
    drafting = "with drafter" if manifest.drafter else "without drafter (pass --drafter for speed)"
    print(f"{options.output}: {size / 1e6:,.1f} MB, {options.bits} bits, {drafting}")


def _check_installed(modules: tuple[str, ...]) -> None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        raise EdgeError(f"{', '.join(missing)} not installed; run: pip install 'gemma-edge[export]'")
