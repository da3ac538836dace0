"""Which plots the page has: picks values from the report and says what they are."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge.bench.figures import short
from edge.report.plots import NEUTRAL, NUM_COLOURS, Bar, Line, Phase, Point, Segment, size_plot, stacked_bars, time_plot

Values = Mapping[str, Any]
FAR = 2.0  # a budget beyond so many of the largest plan would shrink every bar


@dataclass(frozen=True, slots=True)
class Chart:
    """A plot with its headline and a line that says what it shows."""

    title: str
    caption: str
    svg: str
    plan: Values | None = None  # whose parts are listed under the plot


def measured_charts(report: Values) -> list[Chart]:
    """Speed, memory and limits of this machine; a chart without values is left out."""
    measured = report["measured"]
    figures = measured["figures"]
    charts = [
        _first_token(figures),
        _prefill(figures),
        _decode(figures, measured),
        _memory_over_time(measured),
        _files_over_time(measured),
        _where_bytes_go(measured, part_colours(report)),
        _cold_token(figures, measured["setup"]["cold_context_tokens"]),
        _limits(figures),
    ]
    return [chart for chart in charts if chart]


def projected_charts(report: Values) -> list[Chart]:
    """Speeds of the profiles' devices, all of them computed."""
    projections = report["projections"]
    basis = "At most: the whole of the roofline." if _is_bound(projections) else "Scaled by what was reached here."
    decode = [_projected(entry, "decode", "context_tokens", index) for index, entry in enumerate(projections)]
    prefill = [_projected(entry, "prefill", "prompt_tokens", index) for index, entry in enumerate(projections)]
    charts = [
        _lines(
            "PROJECTION: decode",
            f"Computed from each profile's stated speeds, not measured. {basis}",
            decode,
            "context, tokens",
            "tokens/s, projected",
        ),
        _lines(
            "PROJECTION: prefill",
            f"Computed from each profile's stated speeds, not measured. {basis}",
            prefill,
            "prompt, tokens",
            "tokens/s, projected",
        ),
    ]
    return [chart for chart in charts if chart]


def plan_chart(report: Values) -> Chart:
    """Planned anonymous memory of each profile, part by part, against its budget."""
    largest = max(entry["plan"]["anonymous_bytes"] for entry in report["verdict"])
    bars = [
        _plan_bar(
            entry["where"], entry["plan"], part_colours(report), has_limit=entry["plan"]["budget_bytes"] < FAR * largest
        )
        for entry in report["verdict"]
    ]
    return Chart(
        "Planned memory",
        "Anonymous memory with the planned context, part by part. A mark is a budget; far ones are only named. Mapped "
        "weights do not count.",
        stacked_bars("Planned anonymous memory by part", bars, "MB"),
    )


def part_colours(report: Values) -> dict[str, int]:
    """The colour of each part that counts against a budget and is not empty: the same wherever the page has it."""
    plans = [entry["plan"] for entry in report["verdict"]]
    plans += [report["measured"]["plan"]] if report["measured"] else []
    names = [part["name"] for plan in plans for part in plan["parts"] if _is_counted(part)]
    return {name: index % NUM_COLOURS for index, name in enumerate(dict.fromkeys(names))}


def _is_counted(part: Values) -> bool:
    return bool(part["kind"] == "anonymous" and part["num_bytes"])


def _is_bound(projections: Iterable[Values]) -> bool:
    return all(entry["at_most"] for entry in projections)


def _projected(entry: Values, name: str, size: str, colour: int) -> Line:
    points = tuple(Point(found[size], found["tokens_per_s"]) for found in entry[name])
    return Line(entry["profile"], points, is_dashed=True, colour=colour)


def _lines(title: str, caption: str, lines: Sequence[Line], x_label: str, y_label: str) -> Chart | None:
    drawn = [line for line in lines if line.points]
    return Chart(title, caption, size_plot(title, drawn, x_label, y_label)) if drawn else None


def _points(figures: Values, name: str, part: str = "", factor: float = 1.0) -> tuple[Point, ...]:
    """The figures `name.SIZE`, or `name.SIZE.part`, that have a value, by size."""
    found = []
    for key, figure in figures.items():
        parts = key.split(".", 2)
        is_named = parts[0] == name and len(parts) > 1 and parts[2:] == ([part] if part else [])
        if is_named and figure["value"] is not None:
            values = (factor * figure[bound] for bound in ("value", "low", "high"))
            found.append(Point(float(parts[1]), *values))
    return tuple(sorted(found, key=lambda point: point.x))


def _first_token(figures: Values) -> Chart | None:
    line = Line("measured", _points(figures, "first_token", factor=1e-3))
    return _lines("Time to first token", "By length of the prompt.", [line], "prompt, tokens", "seconds")


def _prefill(figures: Values) -> Chart | None:
    line = Line("measured", _points(figures, "prefill"))
    return _lines("Prefill", "Prompt tokens over the time to first token.", [line], "prompt, tokens", "tokens/s")


def _decode(figures: Values, measured: Values) -> Chart | None:
    lines = [Line("no drafts", _points(figures, "decode"))]
    for index, p in enumerate(measured["acceptances"], start=1):
        name = f"drafts, SIMULATED P={p:.2g}"
        lines.append(Line(name, _points(figures, "drafted", f"{p:g}"), is_dashed=True, colour=index))
    caption = "By tokens of context. Without drafts measured as it is."
    if measured["acceptances"]:
        caption += f" Dashed: SIMULATED, each draft stands with probability P, {_source(measured)}."
    return _lines("Decode", caption, lines, "context, tokens", "tokens/s")


def _source(measured: Values) -> str:
    source: str = measured["acceptance_source"]
    return source.upper() if source == "assumed" else source


def _curve(curve: Values, name: str) -> tuple[Point, ...]:
    return tuple(Point(second, value / 1e6) for second, value in zip(curve["seconds"], curve[name], strict=True))


def _memory_over_time(measured: Values) -> Chart | None:
    curve, due = measured["memory"]["curve"], measured["plan"]["peak_bytes"] / 1e6
    if not curve["seconds"]:
        return None
    ends = (curve["seconds"][0], curve["seconds"][-1])
    lines = [
        Line("measured", _curve(curve, "anonymous")),
        Line("planned peak", tuple(Point(second, due) for second in ends), is_dashed=True, colour=1),
    ]
    plot = time_plot("Anonymous memory over time", lines, _phases(curve), "seconds", "MB")
    return Chart("Anonymous memory over time", "A fresh process: what counts against the budget.", plot)


def _files_over_time(measured: Values) -> Chart | None:
    curve = measured["memory"]["curve"]
    if not curve["seconds"]:
        return None
    lines = [Line("mapped", _curve(curve, "mapped"), colour=2)]
    if curve["cgroup"] is not None:
        lines.append(Line("control group", _curve(curve, "cgroup"), colour=NEUTRAL))
    plot = time_plot("Mapped memory over time", lines, _phases(curve), "seconds", "MB")
    caption = "The same process: resident pages of files, and all that its control group takes, page cache included."
    return Chart("Mapped files over time", caption, plot)


def _phases(curve: Values) -> list[Phase]:
    return [Phase(phase["name"], phase["seconds"]) for phase in curve["phases"]]


def _where_bytes_go(measured: Values, colours: Mapping[str, int]) -> Chart:
    peak = max(entry["measured_bytes"] for entry in measured["planned_and_measured"] if entry["key"] != "mapped")
    found = Bar("measured peak", (Segment("measured", peak / 1e6, NEUTRAL),), note=f"{peak / 1e6:,.0f} MB")
    bars = [_plan_bar("planned", measured["plan"], colours), found]
    caption = "Anonymous memory of this run's context, part by part as planned, beside the peak that was measured."
    plot = stacked_bars("Planned and measured memory", bars, "MB")
    return Chart("Where each byte goes", caption, plot, measured["plan"])


def _plan_bar(label: str, plan: Values, colours: Mapping[str, int], *, has_limit: bool | None = None) -> Bar:
    parts = [part for part in plan["parts"] if _is_counted(part)]
    segments = tuple(Segment(part["name"], part["num_bytes"] / 1e6, colours[part["name"]]) for part in parts)
    total = sum(part["num_bytes"] for part in parts) / 1e6
    budget = plan["budget_bytes"] / 1e6
    note = f"{total:,.0f} of {budget:,.0f} MB" if has_limit is not None else f"{total:,.0f} MB"
    return Bar(label, segments, budget if has_limit else None, note)


def _cold_token(figures: Values, context: int) -> Chart | None:
    kinds = {"cold": "PLE row from storage", "warm": "PLE row cached"}
    bars = [
        Bar(name, (Segment(name, figures[f"token.{kind}"]["value"], index),), note=_range(figures[f"token.{kind}"]))
        for index, (kind, name) in enumerate(kinds.items())
        if figures[f"token.{kind}"]["value"] is not None
    ]
    if not bars:
        return None
    looked_up = [short(figures[f"ple_row.{kind}"]["value"]) for kind in kinds]
    caption = (
        f"One token behind a context of {context:,}, its row of the PLE table read from storage or cached. The look-up "
        f"alone takes {looked_up[0]} and {looked_up[1]} ms."
    )
    return Chart("A token from a cold cache", caption, stacked_bars("Time of one token", bars, "milliseconds"))


def _range(figure: Values) -> str:
    return f"{short(figure['value'])} {figure['unit']} ({short(figure['low'])} - {short(figure['high'])})"


def _limits(figures: Values) -> Chart | None:
    named = [figure for figure in figures.values() if figure["limit_share"] is not None]
    bars = [
        Bar(
            figure["label"],
            (Segment(figure["label"], 100 * figure["limit_share"], 0 if figure["key"].startswith("decode") else 2),),
            note=f"{figure['limit_share']:.0%}",
        )
        for figure in named
    ]
    if not bars:
        return None
    rates = [figures[f"roofline.{name}"] for name in ("stream", "product")]
    caption = f"Measured in the same run: {_range(rates[0])}, {_range(rates[1])}. The right edge is the limit."
    plot = stacked_bars("Share of the machine's limit", bars, "% of the limit", least_high=100)
    return Chart("How near to the machine's limits", caption, plot)
