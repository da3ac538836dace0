"""The report for a terminal: the verdict, then the measured figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from edge.bench.figures import RIGHT, Figure, Report, aligned, short
from edge.bench.kv_effect import NUM_DRAFTS

VERDICT = ("device", "fits", "largest context", "peak", "budget", "weights", "decode", "first token", "")
VERDICT_RIGHT = {2, 3, 4, 5, 6, 7}
KV_EFFECT = (
    *("KV rows", "KL mean, nats", "KL max, nats", "same best token", "drafts that stood"),
    *("equal to the end", "tokens before a difference"),
)


def render_text(report: Mapping[str, Any]) -> str:
    """Aligned plain text."""
    verdict = [VERDICT, *(verdict_cells(entry) for entry in report["verdict"])]
    parts = [f"{report['about']['title']}", aligned(verdict, VERDICT_RIGHT)]
    parts += [f"{entry['where']}: {entry['reason']}" for entry in report["verdict"] if entry["reason"]]
    if report["measured"]:
        figures = tuple(Figure(**figure) for figure in report["measured"]["figures"].values())
        parts += ["", Report({}, figures).table(), "", _planned(report["measured"])]
        parts += _kv_effect(report["measured"]["kv_effect"])
    if any(entry["speed_kind"] == "projected" for entry in report["verdict"]):
        parts += ["", f"PROJECTION: {report['definitions']['PROJECTION']}"]
    return "\n".join(parts)


def verdict_cells(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """One row of the verdict; every number that was not measured says so."""
    plan, context, prompt = entry["plan"], entry["decode_context_tokens"], entry["first_token_prompt_tokens"]
    speed = speed_cell(entry["decode_tokens_per_s"], "tokens/s", entry)
    first = speed_cell(entry["first_token_s"], "s", entry)
    return (
        entry["where"],
        "yes" if entry["fits"] else "no",
        f"{plan['max_context_tokens']:,}",
        megabytes(plan["peak_bytes"]),
        megabytes(plan["budget_bytes"]),
        megabytes(plan["mapped_bytes"]),
        speed if context is None else f"{speed} at {context:,}",
        first if prompt is None else f"{first} for {prompt:,}",
        " ".join(part for part in (kind_of(entry), entry["note"]) if part),
    )


def kind_of(entry: Mapping[str, Any]) -> str:
    """How a row's speeds came about."""
    kind = {"measured": "measured", "projected": "PROJECTION", None: ""}[entry["speed_kind"]]
    return f"{kind}, at most" if kind == "PROJECTION" and entry["at_most"] else kind


def speed_cell(value: float | None, unit: str, entry: Mapping[str, Any]) -> str:
    """A speed or a time; a bound where it is one: a speed is at most, a time at least that."""
    if value is None:
        return "-"
    bound = "" if not entry["at_most"] else "at least " if unit == "s" else "at most "
    return f"{bound}{short(value)} {unit}"


def megabytes(num_bytes: int) -> str:
    """Bytes in units of 10^6."""
    return f"{num_bytes / 1e6:,.0f} MB"


def percent(value: float | None) -> str:
    """A signed percentage."""
    return "-" if value is None else f"{value:+.0f} %"


def kv_effect_cells(effect: Mapping[str, Any]) -> tuple[str, ...]:
    """What rows of one type change against float32 ones."""
    stood, reference = effect["acceptance_rate"], effect["float32_acceptance_rate"]
    is_drafting = stood is not None and reference is not None
    return (
        effect["kv_dtype"],
        f"{effect['mean_kl_nats']:.2g}",
        f"{effect['max_kl_nats']:.2g}",
        f"{effect['same_best_share']:.1%}",
        f"{stood:.1%}, float32 {reference:.1%}" if is_drafting else "-",
        f"{effect['num_equal_prompts']:,} of {len(effect['equal_tokens']):,} prompts",
        f"{sum(effect['equal_tokens']):,} of {sum(effect['generated_tokens']):,}",
    )


def kv_effect_basis(effects: Sequence[Mapping[str, Any]]) -> str:
    """At what the types of KV rows were compared; the same for all of them."""
    num_positions, context = effects[0]["num_positions"], effects[0]["context_tokens"]
    return (
        f"Against float32 KV rows: the last {num_positions:,} positions of a context of {context:,} tokens of the "
        f"prompts' text; {NUM_DRAFTS} drafts a round; greedy continuations of the prompts."
    )


def _kv_effect(effects: Sequence[Mapping[str, Any]]) -> list[str]:
    if not effects:
        return []
    rows = [KV_EFFECT, *(kv_effect_cells(effect) for effect in effects)]
    return ["", kv_effect_basis(effects), aligned(rows, range(1, len(KV_EFFECT)))]


def _planned(measured: Mapping[str, Any]) -> str:
    rows = [("memory", "planned", "measured", "error")]
    rows += [
        (
            entry["what"],
            megabytes(entry["planned_bytes"]),
            megabytes(entry["measured_bytes"]),
            percent(entry["error_percent"]),
        )
        for entry in measured["planned_and_measured"]
    ]
    return aligned(rows, RIGHT | {2})
