"""Tables of the page. Cells are markup, numbers are formatted as in the terminal."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from edge.bench.figures import short
from edge.report.markup import element
from edge.report.text import KV_EFFECT, kind_of, kv_effect_cells, megabytes, percent, speed_cell

Values = Mapping[str, Any]


def verdict_table(verdict: Iterable[Values]) -> str:
    """What fits where and how fast, a row a device."""
    memory = ("largest context", "peak memory", "budget", "mapped weights")
    head = ("device", "fits", "speeds are", "decode", "first token", *memory, "")
    return table(head, [_verdict_row(entry) for entry in verdict], right=range(3, 9))


def _verdict_row(entry: Values) -> list[str]:
    plan = entry["plan"]
    fits = element("span", "yes", class_="good") if entry["fits"] else element("span", "no", class_="bad")
    notes = " ".join(part for part in (entry["reason"], entry["note"]) if part)
    kind = kind_of(entry)
    label = tag(kind, is_warning=kind.startswith("PROJECTION")) if kind else ""
    return [
        escape(entry["where"]) + "<br>" + element("small", escape(_what(entry))),
        fits,
        label,
        _speed(entry, "decode_tokens_per_s", "tokens/s", "decode_context_tokens", "at context"),
        _speed(entry, "first_token_s", "s", "first_token_prompt_tokens", "prompt of"),
        f"{plan['max_context_tokens']:,}",
        megabytes(plan["peak_bytes"]),
        megabytes(plan["budget_bytes"]),
        megabytes(plan["mapped_bytes"]),
        escape(notes),
    ]


def _what(entry: Values) -> str:
    plan = entry["plan"]
    bits, layout, kv = plan["bits"], plan["layout"], plan["kv_dtype"]
    own = f"profile {entry['profile']}, " if entry["where"] != entry["profile"] else ""
    return f"{own}{bits} bits, {layout}, KV {kv}"


def _speed(entry: Values, key: str, unit: str, size_key: str, at: str) -> str:
    cell = escape(speed_cell(entry[key], unit, entry))
    return cell if entry[key] is None else cell + "<br>" + element("small", f"{at} {entry[size_key]:,}")


def figures_table(figures: Values) -> str:
    """Every measured figure, a row each."""
    head = ("figure", "median", "unit", "range", "of limit", "")
    rows = [_figure_row(figure) for figure in figures.values()]
    return table(head, rows, right=(1, 3, 4), keys=list(figures))


def _figure_row(figure: Values) -> list[str]:
    label = escape(figure["label"])
    if figure["simulated"]:
        label += " " + tag("SIMULATED")
    if figure["value"] is None:
        return [label, "-", escape(figure["unit"]), "", "", escape(figure["note"])]
    spread = f"{short(figure['low'])} - {short(figure['high'])}" if figure["low"] != figure["high"] else ""
    share = "" if figure["limit_share"] is None else f"{figure['limit_share']:.0%}"
    return [label, short(figure["value"]), escape(figure["unit"]), spread, share, escape(figure["note"])]


def planned_table(measured: Values) -> str:
    """What was planned beside what was measured."""
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
    return table(head, rows, right=(1, 2, 3))


def kv_effect_table(effects: Sequence[Values]) -> str:
    """What narrower KV rows change, a row a type."""
    rows = [[escape(cell) for cell in kv_effect_cells(effect)] for effect in effects]
    keys = [f"kv_effect.{effect['kv_dtype']}" for effect in effects]
    return table(KV_EFFECT, rows, right=range(1, len(KV_EFFECT)), keys=keys)


def parts_table(plans: Sequence[tuple[str, Values]], colours: Mapping[str, int]) -> str:
    """A row a part that is not empty, a column a plan; colours are those of the bars."""
    names = [(part["name"], part["kind"]) for _, plan in plans for part in plan["parts"] if part["num_bytes"]]
    sizes = [{(part["name"], part["kind"]): part["num_bytes"] for part in plan["parts"]} for _, plan in plans]
    rows = []
    for name, kind in dict.fromkeys(names):
        colour = f"swatch b{colours[name]}" if kind == "anonymous" else "swatch"
        cells = [megabytes(found[name, kind]) if found.get((name, kind)) else "-" for found in sizes]
        rows.append([element("span", class_=colour) + escape(name), escape(kind), *cells])
    head = ("part", "kind", *(name for name, _ in plans))
    return table(head, rows, right=range(2, len(head)))


def projected_table(projections: Sequence[Values]) -> str:
    """Projected speeds, a row a profile, and what bounds them."""
    contexts = sorted({found["context_tokens"] for entry in projections for found in entry["decode"]})
    decode = (f"tokens/s at {context:,}" for context in contexts)
    head = ("profile", "memory GB/s", "int8 TOP/s", "storage GB/s", *decode, "projected: how")
    rows = [_projected_row(entry, contexts) for entry in projections]
    keys = [f"projection.{entry['profile']}" for entry in projections]
    return table(head, rows, right=range(1, len(head) - 1), keys=keys)


def _projected_row(entry: Values, contexts: Sequence[int]) -> list[str]:
    stated = [entry[key] for key in ("memory_gb_per_s", "int8_tops", "storage_gb_per_s")]
    speeds = ["-" if value is None else f"{value:g}" for value in stated]
    found = {point["context_tokens"]: point for point in entry["decode"]}
    bound = "at most " if entry["at_most"] else ""
    cells = [
        f"{bound}{short(found[size]['tokens_per_s'])}<br>" + element("small", f"{found[size]['bound_by']}-bound")
        if size in found
        else "-"
        for size in contexts
    ]
    how = "; ".join(part for part in (entry["note"], entry["residency"]["note"]) if part)
    return [escape(entry["profile"]), *speeds, *cells, escape(how)]


def tag(text: str, *, is_warning: bool = True) -> str:
    """A small label that says what a number is."""
    return element("span", escape(text), class_="tag warn" if is_warning else "tag")


def table(head: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int], keys: Sequence[str] = ()) -> str:
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
