"""The report as one HTML page: no script, nothing from elsewhere, every number from the report's own values."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from edge.bench.figures import short
from edge.report.charts import Chart, measured_charts, plan_chart, projected_charts
from edge.report.markup import element
from edge.report.style import style_sheet
from edge.report.text import kind_of, megabytes, percent, speed_cell

Values = Mapping[str, Any]


def render_page(report: Values) -> str:
    """The whole document."""
    title = f"{report['about']['title']} on the device"
    sections = [_header(report, title), _verdict(report)]
    if report["measured"]:
        sections.append(_measured(report))
    sections += [_projections(report), _notes(report)]
    head = [
        '<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        element("title", escape(title)),
        element("style", style_sheet()),
    ]
    html = element("html", element("head", *head), element("body", *sections), lang="en")
    return f"<!doctype html>\n{html}\n"


def _header(report: Values, title: str) -> str:
    about, measured = report["about"], report["measured"]
    tags = []
    if about["kind"] == "dummy":
        tags.append(_tag("RANDOM WEIGHTS: speed and memory are real, text is not"))
    if about["kind"] == "model":
        tags.append(_tag("PLAN AND PROJECTION ONLY: nothing was measured"))
    if measured and measured["acceptances"]:
        word = "ASSUMED" if measured["acceptance_source"] == "assumed" else "FROM PROMPTS"
        tags.append(_tag(f"ACCEPTANCE {word}: speeds with drafts are SIMULATED"))
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
    return " ".join(sentences)


def _tag(text: str) -> str:
    return element("span", escape(text), class_="tag warn")


def _verdict(report: Values) -> str:
    head = (
        "device",
        "fits",
        "largest context",
        "peak memory",
        "budget",
        "weights, mapped",
        "decode",
        "first token",
        "",
    )
    rows = [_verdict_row(entry) for entry in report["verdict"]]
    return element("section", _table(head, rows, right=range(2, 8)), id="verdict")


def _verdict_row(entry: Values) -> list[str]:
    plan = entry["plan"]
    fits = element("span", "yes", class_="good") if entry["fits"] else element("span", "no", class_="bad")
    notes = " ".join(part for part in (entry["reason"], entry["note"]) if part)
    kind = kind_of(entry)
    tag = element("span", escape(kind), class_="tag warn" if kind.startswith("PROJECTION") else "tag") if kind else ""
    return [
        escape(entry["where"]) + "<br>" + element("small", escape(_what(entry))),
        fits,
        f"{plan['max_context_tokens']:,}",
        megabytes(plan["peak_bytes"]),
        megabytes(plan["budget_bytes"]),
        megabytes(plan["mapped_bytes"]),
        _speed(entry, "decode_tokens_per_s", "tokens/s", "decode_context_tokens", "at context"),
        _speed(entry, "first_token_s", "s", "first_token_prompt_tokens", "prompt of"),
        f"{tag} {escape(notes)}".strip(),
    ]


def _what(entry: Values) -> str:
    plan = entry["plan"]
    bits, layout, kv = plan["bits"], plan["layout"], plan["kv_dtype"]
    own = f"profile {entry['profile']}, " if entry["where"] != entry["profile"] else ""
    return f"{own}{entry['model']}, {bits} bits, {layout}, KV {kv}"


def _speed(entry: Values, key: str, unit: str, size_key: str, at: str) -> str:
    cell = escape(speed_cell(entry[key], unit, entry))
    return cell if entry[key] is None else cell + "<br>" + element("small", f"{at} {entry[size_key]:,}")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int], keys: Sequence[str] = ()) -> str:
    """Cells are markup; a row's key names its values for whoever reads the page by program."""
    flush = set(right)

    def cell(name: str, column: int, content: str) -> str:
        kind = "n" if column in flush else "note" if column == len(head) - 1 and name == "td" else ""
        return element(name, content, **({"class_": kind} if kind else {}))

    body = []
    for index, row in enumerate(rows):
        cells = [cell("td", column, content) for column, content in enumerate(row)]
        body.append(element("tr", *cells, **({"data_key": keys[index]} if keys else {})))
    top = element("tr", *(cell("th", column, escape(name)) for column, name in enumerate(head)))
    return element("div", element("table", element("thead", top), element("tbody", *body)), class_="scroll")


def _charts(charts: Iterable[Chart]) -> str:
    figures = [
        element(
            "figure",
            element("h3", escape(chart.title)),
            element("p", escape(chart.caption), class_="caption"),
            chart.svg,
            _parts([("planned", chart.plan)]) if chart.plan else "",
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
        _charts(measured_charts(report)),
        element("h3", "Planned against measured memory"),
        _planned(measured),
        element("h3", "All figures"),
        _figures(measured["figures"]),
        id="measured",
    )


def _figures(figures: Values) -> str:
    head = ("figure", "median", "unit", "range", "of limit", "")
    rows = [_figure_row(figure) for figure in figures.values()]
    return _table(head, rows, right=(1, 3, 4), keys=list(figures))


def _figure_row(figure: Values) -> list[str]:
    label = escape(figure["label"])
    if figure["simulated"]:
        label += " " + element("span", "SIMULATED", class_="tag warn")
    if figure["value"] is None:
        return [label, "-", escape(figure["unit"]), "", "", escape(figure["note"])]
    spread = f"{short(figure['low'])} - {short(figure['high'])}" if figure["low"] != figure["high"] else ""
    share = "" if figure["limit_share"] is None else f"{figure['limit_share']:.0%}"
    return [label, short(figure["value"]), escape(figure["unit"]), spread, share, escape(figure["note"])]


def _planned(measured: Values) -> str:
    head = ("memory", "planned", "measured", "error")
    rows = [
        [
            escape(entry["what"]),
            megabytes(entry["planned_bytes"]),
            megabytes(entry["measured_bytes"]),
            percent(entry["error_percent"]),
        ]
        for entry in measured["planned_and_measured"]
    ]
    return _table(head, rows, right=(1, 2, 3))


def _parts(plans: Sequence[tuple[str, Values]]) -> str:
    """A row a part in their order, a column a plan; colours are those of the bars."""
    names = list(dict.fromkeys((part["name"], part["kind"]) for _, plan in plans for part in plan["parts"]))
    counted = [name for name in names if name[1] == "anonymous"]
    rows = []
    for name, kind in names:
        colour = f"swatch b{counted.index((name, kind)) % 8}" if kind == "anonymous" else "swatch"
        sizes = [{(part["name"], part["kind"]): part["num_bytes"] for part in plan["parts"]} for _, plan in plans]
        cells = [megabytes(found[name, kind]) if (name, kind) in found else "-" for found in sizes]
        rows.append([element("span", class_=colour) + escape(name), escape(kind), *cells])
    head = ("part", "kind", *(name for name, _ in plans))
    return _table(head, rows, right=range(2, len(head)))


def _projections(report: Values) -> str:
    projections = report["projections"]
    return element(
        "section",
        element("h2", "Devices: plan and PROJECTION"),
        element("p", escape(report["definitions"]["PROJECTION"]), class_="sub"),
        _charts([plan_chart(report), *projected_charts(report)]),
        _parts([(entry["where"], entry["plan"]) for entry in report["verdict"]]),
        element("h3", "PROJECTION, by profile"),
        _projected_table(projections),
        id="projections",
    )


def _projected_table(projections: Sequence[Values]) -> str:
    contexts = sorted({found["context_tokens"] for entry in projections for found in entry["decode"]})
    head = (
        "profile",
        "memory GB/s",
        "int8 TOP/s",
        "storage GB/s",
        *(f"decode at {context:,}" for context in contexts),
        "projected: how",
    )
    rows = [_projected_row(entry, contexts) for entry in projections]
    return _table(head, rows, right=range(1, len(head) - 1), keys=[f"projection.{e['profile']}" for e in projections])


def _projected_row(entry: Values, contexts: Sequence[int]) -> list[str]:
    stated = [entry[key] for key in ("memory_gb_per_s", "int8_tops", "storage_gb_per_s")]
    found = {point["context_tokens"]: point for point in entry["decode"]}
    cells = [
        speed_cell(found[size]["tokens_per_s"], "tokens/s", entry) + "<br>" + element("small", found[size]["bound_by"])
        if size in found
        else "-"
        for size in contexts
    ]
    how = "; ".join(part for part in (entry["note"], entry["residency"]["note"], entry["basis"]) if part)
    speeds = ["-" if value is None else f"{value:g}" for value in stated]
    return [escape(entry["profile"]), *speeds, *cells, escape(how)]


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
