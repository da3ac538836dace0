"""What edge-bench and edge-report measure: an artifact, or one of a model's size with random weights; and on what."""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from runtime.errors import EdgeError

LAYOUTS = ("native", "portable")


def add_recipe_options(parser: argparse.ArgumentParser, of: str) -> None:
    """The options that say how an artifact would be exported; `of` names the option that they are for."""
    parser.add_argument("--bits", type=int, metavar="4|8|16|32", help=f"with {of}: bits of a weight (default: 4)")
    parser.add_argument(
        "--block-size", type=int, metavar="N", help=f"with {of}: weights that share a scale (default: 32)"
    )
    parser.add_argument("--layout", choices=LAYOUTS, help=f"with {of}: how weights lie in their files")


def add_acceptance_options(parser: argparse.ArgumentParser) -> None:
    """The options that say which drafts stand."""
    parser.add_argument(
        "--assume-acceptance",
        type=_probability,
        action="append",
        default=[],
        metavar="P",
        help="also simulate that each draft stands with probability P; repeatable",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='also measure drafting on real text: a JSON list of texts, or of objects with a "text"',
    )


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no probability of 0 to 1")
    return value


def artifact_folder(options: argparse.Namespace) -> Path:
    """The artifact that was named, or the one of `--dummy`, which is made where it is not in the cache.

    Raises:
        EdgeError: an option is for the other of the two, or the artifact with random weights cannot be made.
    """
    if options.artifact is not None:
        refuse_recipe_options(options)
        return Path(options.artifact)
    from export.cli import NEEDED
    from quant.recipe import RecipeError, make_recipe

    try:
        from export.dummy import dummy_artifact
        from export.released import RELEASED
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        raise EdgeError(f"--dummy: {error.name} is not installed; run: pip install 'gemma-edge[export]'") from error
    try:
        recipe = make_recipe(
            4 if options.bits is None else options.bits, 32 if options.block_size is None else options.block_size
        )
    except RecipeError as error:
        raise EdgeError(str(error)) from error
    dummy, show_progress = RELEASED[options.dummy], not options.quiet
    return dummy_artifact(dummy, recipe, layout=options.layout, show_progress=show_progress)


def refuse_recipe_options(options: argparse.Namespace) -> None:
    """Raises EdgeError for an option of the export: an artifact has its own."""
    for name in ("bits", "block_size", "layout"):
        if getattr(options, name) is not None:
            option = f"--{name.replace('_', '-')}"
            raise EdgeError(f"{option} is for --dummy; an artifact has its own, made by edge-export {option}")


def prompt_texts(path: Path) -> tuple[str, ...]:
    """The texts of a JSON file; EdgeError where it is none."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EdgeError(f"--prompts {path}: {error.strerror}; name a file that can be read") from error
    except ValueError as error:  # no UTF-8, or no JSON
        raise EdgeError(f"--prompts {path}: {error}; expected a JSON list of texts") from error
    if isinstance(entries, list):
        found = [entry.get("text") if isinstance(entry, dict) else entry for entry in entries]
        texts = [text for text in found if isinstance(text, str) and text]
        if texts and len(texts) == len(found):
            return tuple(texts)
    raise EdgeError(f'--prompts {path}: expected a JSON list of texts, or of objects with a "text", and at least one')


def progress_lines(name: str, *, is_quiet: bool) -> Callable[[str], None]:
    """What tells on standard error how far a command has come, unless it is to be quiet."""

    def tell(line: str) -> None:
        if not is_quiet:
            print(f"{name}: {line}", file=sys.stderr, flush=True)

    return tell
