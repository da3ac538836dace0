"""Recipe `auto`: bits for each tensor by what it costs on a text, within so many bytes or so much KL divergence."""

from pathlib import Path

from tqdm import tqdm

from export.errors import ExportError
from export.expected import decoder_matrices, drafter_matrices, stored_bytes, tables
from export.pipeline import Source
from export.sensitivity import FORMATS, Sensitivity, sensitivities
from quant.mix import Mix, total_bytes, total_kl, within_bytes, within_kl
from quant.recipe import DRAFTER, Recipe, Rule, WeightFormat

DRAFTER_FORM = WeightFormat(8, 32)


def auto_recipe(
    source: Source, text: Path, *, max_bytes: int | None, max_kl: float | None, show_progress: bool = True
) -> Recipe:
    """The recipe that keeps the limit; exactly one is given.

    Args:
        max_bytes: of all weights, those of the drafter and the tables too
        max_kl: predicted mean KL divergence on the text, in nats

    Raises:
        ExportError: no recipe keeps the limit, or the text cannot be used.
    """
    fixed = _drafter_bytes(source)
    if max_bytes is not None:
        _check_bytes(source, max_bytes, fixed)  # known before minutes of measuring
    layers = len(source.model.layers)
    with tqdm(total=layers, unit=" layers", desc="sensitivity", disable=None if show_progress else True) as bar:

        def advance(num_layers: int) -> None:
            bar.update(num_layers)

        measured = sensitivities(source.target, source.prefix, source.model, text, advance)
    options = {tensor.name: tensor.options for tensor in measured}
    if max_bytes is not None:
        mix, asked = within_bytes(options, max_bytes - fixed), f"--max-bytes {max_bytes:,}"
        assert mix is not None, "the smallest mix was checked"
    else:
        assert max_kl is not None
        mix, asked = within_kl(options, max_kl), f"--max-kl {max_kl:g}"
        if mix is None:
            best = sum(min(option.kl_nats for option in mine) for mine in options.values())
            raise _beyond(asked, f"8 bits throughout are predicted to cost {best:.2g} nats")
    return _recipe(mix, measured, f"{asked}: {total_bytes(mix) + fixed:,} bytes, predicted KL {total_kl(mix):.2g} nats")


def _drafter_bytes(source: Source) -> int:
    if source.drafter_config is None:
        return 0
    shapes = drafter_matrices(source.drafter_config)
    return sum(stored_bytes(shape, shape.fixed or DRAFTER_FORM) for shape in shapes)


def _check_bytes(source: Source, max_bytes: int, fixed: int) -> None:
    shapes = (*tables(source.model), *decoder_matrices(source.model))
    least = sum(min(stored_bytes(shape, form) for form in FORMATS) for shape in shapes) + fixed
    if least > max_bytes:
        raise _beyond(f"--max-bytes {max_bytes:,}", f"the smallest mix has {least:,} bytes")


def _beyond(asked: str, why: str) -> ExportError:
    return ExportError(f"{asked}: no mix of 4 and 8 bits keeps it, {why}; raise the limit")


def _recipe(mix: Mix, measured: list[Sensitivity], description: str) -> Recipe:
    forms = {f"{DRAFTER}*": DRAFTER_FORM} | {tensor.name: mix[tensor.name].form for tensor in measured}
    rules = [Rule((name,), bits=form.bits, block_size=form.block_size) for name, form in forms.items()]
    return Recipe("auto", description, "int8", (Rule(("*",), method="best"),)).with_rules(rules)
