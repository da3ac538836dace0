"""Recipe `auto`: bits for each tensor by what it costs on a text, within so many bytes or so much KL divergence."""

from pathlib import Path

from tqdm import tqdm

from export.errors import ExportError
from export.expected import drafter_matrices, stored_bytes
from export.pipeline import Source
from export.sensitivity import Sensitivity, sensitivities
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
    layers = len(source.model.layers)
    with tqdm(total=layers, unit=" layers", desc="sensitivity", disable=None if show_progress else True) as bar:

        def advance(num_layers: int) -> None:
            bar.update(num_layers)

        measured = sensitivities(source.target, source.prefix, source.model, text, advance)
    options = {tensor.name: tensor.options for tensor in measured}
    fixed = 0
    if source.drafter_config is not None:
        shapes = drafter_matrices(source.drafter_config)
        fixed = sum(stored_bytes(shape, shape.fixed or DRAFTER_FORM) for shape in shapes)
    mix: Mix | None
    if max_bytes is not None:
        mix, asked = within_bytes(options, max_bytes - fixed), f"--max-bytes {max_bytes:,}"
        least = sum(min(option.num_bytes for option in mine) for mine in options.values()) + fixed
        way_out = f"the smallest mix has {least:,} bytes"
    else:
        assert max_kl is not None
        mix, asked = within_kl(options, max_kl), f"--max-kl {max_kl:g}"
        best = sum(min(option.kl_nats for option in mine) for mine in options.values())
        way_out = f"8 bits throughout are predicted to cost {best:.2g} nats"
    if mix is None:
        raise ExportError(f"{asked}: no mix of 4 and 8 bits keeps it, {way_out}; raise the limit")
    return _recipe(mix, measured, f"{asked}: {total_bytes(mix) + fixed:,} bytes, predicted KL {total_kl(mix):.2g} nats")


def _recipe(mix: Mix, measured: list[Sensitivity], description: str) -> Recipe:
    forms = {f"{DRAFTER}*": DRAFTER_FORM} | {tensor.name: mix[tensor.name].form for tensor in measured}
    rules = [Rule((name,), bits=form.bits, block_size=form.block_size) for name, form in forms.items()]
    return Recipe("auto", description, "int8", (Rule(("*",), method="best"),)).with_rules(rules)
