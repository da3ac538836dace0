"""The report as one HTML page: no script, nothing from elsewhere, every number from the report's own values."""

from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from edge.bench.figures import short
from edge.report.charts import Chart, measured_charts, part_colours, plan_chart, projected_charts
from edge.report.markup import document, element
from edge.report.style import style_sheet
from edge.report.tables import (
    figures_table,
    kv_effect_table,
    parts_table,
    planned_table,
    projected_table,
    tag,
    verdict_table,
)
from edge.report.text import kv_effect_basis, megabytes

Values = Mapping[str, Any]


def render_page(report: Values) -> str:
    """The whole document."""
    title = f"{report['about']['title']} on the device"
    sections = [_header(report, title), element("section", verdict_table(report["verdict"]), id="verdict")]
    if report["measured"]:
        sections.append(_measured(report))
        sections += [_kv_effect(report)] if report["measured"]["kv_effect"] else []
    sections += [_projections(report), _notes(report)]
    return document(title, style_sheet(), *sections)


def _header(report: Values, title: str) -> str:
    about, measured = report["about"], report["measured"]
    tags = []
    if about["kind"] == "dummy":
        tags.append(tag("RANDOM WEIGHTS: speed and memory are real, text is not"))
    if about["kind"] == "model":
        tags.append(tag("PLAN AND PROJECTION ONLY: nothing was measured"))
    if measured and measured["acceptances"]:
        word = "ASSUMED" if measured["acceptance_source"] == "assumed" else "FROM PROMPTS"
        tags.append(tag(f"ACCEPTANCE {word}: speeds with drafts are SIMULATED"))
    where = f"{about['cpu']}, {about['num_physical_cores']} cores, {megabytes(about['memory_bytes'])} of memory"
    subtitle = f"{about['date'][:10]} · {where}" if measured else about["date"][:10]
    return element(
        "header",
        element("h1", escape(title)),
        element("div", escape(subtitle), class_="sub"),
        element("p", escape(summary(report)), class_="summary"),
        " ".join(tags),
    )


def summary(report: Values) -> str:
    """The verdict in a sentence or two."""
    verdict = report["verdict"]
    devices = [entry for entry in verdict if entry["where"] != "this machine"]
    sentences = []
    for entry in verdict:
        if entry["where"] == "this machine" and entry["decode_tokens_per_s"] is not None:
            text = f"On this machine it generates {short(entry['decode_tokens_per_s'])} tokens a second"
            if entry["first_token_s"] is not None:
                prompt = f"{entry['first_token_prompt_tokens']:,} tokens"
                text += f" and begins to answer {short(entry['first_token_s'])} s after a prompt of {prompt}"
            sentences.append(f"{text} (measured).")
    num_fits = sum(entry["fits"] for entry in devices)
    sentences.append(f"By plan it fits {num_fits} of {len(devices)} device profiles.")
    speeds = [entry["decode_tokens_per_s"] for entry in devices if entry["decode_tokens_per_s"] is not None]
    if speeds:
        bound = "at most " if any(entry["at_most"] for entry in devices) else ""
        sentences.append(f"PROJECTION for them: {bound}{short(min(speeds))} to {short(max(speeds))} tokens a second.")
    return " ".join(sentences)


def _charts(charts: Iterable[Chart], colours: Mapping[str, int]) -> str:
    figures = [
        element(
            "figure",
            element("h3", escape(chart.title)),
            element("p", escape(chart.caption), class_="caption"),
            chart.svg,
            parts_table([("planned", chart.plan)], colours) if chart.plan else "",
        )
        for chart in charts
    ]
    return element("div", *figures, class_="grid")


def _measured(report: Values) -> str:
    measured = report["measured"]
    setup = measured["setup"]
    ops = f"instruction set {setup['instruction_set']}" if setup["instruction_set"] else "onnxruntime's own operators"
    swap = "swap off" if not setup["swap_total_bytes"] else f"swap on, {megabytes(setup['swap_used_bytes'])} used"
    told = (
        f"Layout {setup['layout']}, {ops}, {setup['num_threads']} threads, prefill in chunks of "
        f"{setup['prefill_chunk_tokens']:,}, {setup['num_passes']} interleaved passes, {swap}."
    )
    return element(
        "section",
        element("h2", "Measured on this machine"),
        element("p", escape(told), class_="sub"),
        _charts(measured_charts(report), part_colours(report)),
        element("h3", "Planned against measured memory"),
        planned_table(measured),
        element("h3", "All figures"),
        figures_table(measured["figures"]),
        id="measured",
    )


def _kv_effect(report: Values) -> str:
    effects = report["measured"]["kv_effect"]
    return element(
        "section",
        element("h2", "What narrower KV rows change"),
        element("p", escape(kv_effect_basis(effects)), class_="sub"),
        kv_effect_table(effects),
        element("p", escape(f"KL: {report['definitions']['KL']}."), class_="caption"),
        id="kv-effect",
    )


def _projections(report: Values) -> str:
    projections = report["projections"]
    return element(
        "section",
        element("h2", "Devices: plan and PROJECTION"),
        element("p", escape(f"PROJECTION: {report['definitions']['PROJECTION']}."), class_="sub"),
        _charts([plan_chart(report), *projected_charts(report)], part_colours(report)),
        parts_table([(entry["where"], entry["plan"]) for entry in report["verdict"]], part_colours(report)),
        element("h3", "PROJECTION, by profile"),
        element("p", escape(f"Speeds are {projections[0]['basis']}."), class_="caption"),
        projected_table(projections),
        id="projections",
    )


def _notes(report: Values) -> str:
    about = report["about"]
    limit = about["cgroup_limit_bytes"]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    machine = {
        "command": about["command"],
        "source": about["source"],
        "date": about["date"],
        "processor": f"{about['cpu']} ({about['machine']}), instruction set {about['instruction_set']}",
        "cores": f"{about['num_physical_cores']} physical, {about['num_logical_cores']} logical",
        "memory": f"{megabytes(about['memory_bytes'])}, control group limit "
        + ("none" if limit is None else megabytes(limit)),
        "system": f"{about['system']}, Python {about['python']}",
        "versions": versions,
    }
    return element(
        "section",
        element("h2", "What the figures mean"),
        _list(report["definitions"]),
        element("h2", "Where and with what"),
        _list(machine),
        id="notes",
    )


def _list(entries: Values) -> str:
    return element("dl", *(element("dt", escape(k)) + element("dd", escape(str(v))) for k, v in entries.items()))
