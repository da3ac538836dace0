"""A quality report for a terminal, and as a page of its own."""

from collections.abc import Mapping
from html import escape
from typing import Any

from edge.quality.measure import Quality
from edge.report.markup import document, element
from edge.report.style import style_sheet
from edge.report.tables import table
from export.sensitivity import Sensitivity

MOST_ROWS = 12  # of tensors, in the terminal


def figures(quality: Quality) -> list[tuple[str, str]]:
    """What was measured, as names and values."""
    own = "" if quality.is_own_source else " (another checkpoint than the artifact was exported from)"
    rows = [
        ("reference", f"{quality.reference}{own}"),
        ("text", f"{quality.text}, {quality.num_tokens:,} tokens"),
        ("weights", f"{quality.num_weight_bytes:,} bytes"),
        ("KL divergence, mean", f"{quality.mean_kl_nats:.3g} nats"),
        ("KL divergence, 99th percentile", f"{quality.p99_kl_nats:.3g} nats"),
        ("same best token", f"{quality.top1_agreement:.2%}"),
        ("perplexity, reference", f"{quality.reference_perplexity:.4g}"),
        ("perplexity, artifact", f"{quality.artifact_perplexity:.4g}"),
    ]
    return rows + [(f"acceptance of {n} draft{'s'[: n > 1]}", f"{rate:.1%}") for n, rate in quality.acceptance.items()]


def render_text(quality: Quality, sensitivities: list[Sensitivity]) -> str:
    """Figures, the tensors with the largest errors, and those that cost most KL a byte where that was measured."""
    lines = [f"{name:32} {value}" for name, value in figures(quality)]
    lines += ["", f"{'largest relative errors':44} format, method"]
    for name, entry in _by_error(quality)[:MOST_ROWS]:
        lines.append(f"  {name:34} {entry['relative_error']:.4f}  {entry['format']}, {entry['method']}")
    if sensitivities:
        lines += ["", "most KL for each megabyte that 4 bits save against 8"]
        for tensor in _by_cost(sensitivities)[:MOST_ROWS]:
            lines.append(f"  {tensor.name:34} {tensor.kl_per_megabyte:9.3g} nats/MB  {tensor.kl_nats:.3g} nats")
    return "\n".join(lines)


def render_page(quality: Quality, sensitivities: list[Sensitivity]) -> str:
    """The whole document: no script, nothing from elsewhere."""
    title = f"Quality of {quality.artifact}"
    sections = [
        element("header", element("h1", escape(title))),
        element(
            "section",
            table(("figure", "value"), [[escape(cell) for cell in row] for row in figures(quality)], right=()),
        ),
    ]
    if sensitivities:
        rows = [[escape(t.name), f"{t.kl_per_megabyte:.3g}", f"{t.kl_nats:.3g}"] for t in _by_cost(sensitivities)]
        head = ("tensor", "nats for each MB that 4 bits save against 8", "KL of 4 bits, nats")
        sections.append(element("section", element("h2", "Sensitivity"), table(head, rows, right=(1, 2))))
    errors = [
        [escape(name), f"{entry['relative_error']:.4f}", escape(entry["format"]), escape(entry["method"])]
        for name, entry in _by_error(quality)
    ]
    head_of_errors = ("tensor", "relative error", "format", "method")
    sections.append(element("section", element("h2", "Tensors"), table(head_of_errors, errors, right=(1,))))
    return document(title, style_sheet(), *sections)


def _by_error(quality: Quality) -> list[tuple[str, Mapping[str, Any]]]:
    return sorted(quality.tensors.items(), key=lambda item: -item[1]["relative_error"])


def _by_cost(sensitivities: list[Sensitivity]) -> list[Sensitivity]:
    return sorted(sensitivities, key=lambda tensor: -tensor.kl_per_megabyte)
