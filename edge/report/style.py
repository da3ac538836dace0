"""The page's style sheet: light and dark by the reader's preference, one column on a phone, plain in print."""

PLOT_COLOURS = {  # the last one is of no series
    "light": (
        *("#1f5fa8", "#b4501a", "#2c7a58", "#7349a0", "#8a6a10", "#a83262"),
        *("#127283", "#7d5140", "#4a5fc1", "#5d7414", "#94397f", "#9a3b3b"),
        "#6b7787",
    ),
    "dark": (
        *("#74ace9", "#e8935a", "#68c39c", "#b99ae0", "#d3b553", "#e988a8"),
        *("#58bdcc", "#c9a08c", "#95a3f2", "#adc76b", "#da90d2", "#e58585"),
        "#8f9bab",
    ),
}
INK = {
    "light": {
        "paper": "#ffffff",
        "panel": "#f6f8fa",
        "ink": "#1b2430",
        "muted": "#566171",
        "rule": "#dde2e8",
        "good": "#1d6b45",
        "bad": "#a3262a",
        "warn": "#8a5a00",
    },
    "dark": {
        "paper": "#12161b",
        "panel": "#1a2027",
        "ink": "#e7ebf0",
        "muted": "#a2adba",
        "rule": "#2f3843",
        "good": "#6fd0a0",
        "bad": "#f08a8a",
        "warn": "#e5b75c",
    },
}


def style_sheet() -> str:
    """The whole sheet."""
    dark = f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables('dark')} }} }}"
    series = "".join(
        f".s{index}{{stroke:var(--c{index})}}.f{index}{{fill:var(--c{index})}}.t{index}{{fill:var(--c{index})}}"
        f".b{index}{{background:var(--c{index})}}"
        for index in range(len(PLOT_COLOURS["light"]))
    )
    return f":root {{ color-scheme: light dark; {_variables('light')} }}\n{dark}\n{_RULES}{series}\n"


def _variables(scheme: str) -> str:
    colours = {f"c{index}": colour for index, colour in enumerate(PLOT_COLOURS[scheme])} | INK[scheme]
    return " ".join(f"--{name}:{colour};" for name, colour in colours.items())


_RULES = """\
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 28px 24px 60px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 27px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 19px; margin: 40px 0 4px; padding-top: 14px; border-top: 1px solid var(--rule); }
h3 { font-size: 15px; margin: 0; }
p { margin: 4px 0 12px; max-width: 76ch; }
.sub, .caption { color: var(--muted); }
.caption { font-size: 13px; margin: 0 0 6px; }
.summary { font-size: 17px; margin: 16px 0 14px; }
.tag { display: inline-block; font-size: 11px; font-weight: 600; letter-spacing: .03em; padding: 1px 7px;
  border: 1px solid currentColor; border-radius: 9px; color: var(--muted); white-space: nowrap; }
.tag.warn { color: var(--warn); }
.good { color: var(--good); font-weight: 600; }
.bad { color: var(--bad); font-weight: 600; }
.scroll { overflow-x: auto; margin: 8px 0 14px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--rule); vertical-align: top; }
th { color: var(--muted); font-weight: 500; font-size: 13px; white-space: nowrap; }
td.n, th.n { text-align: right; white-space: nowrap; }
td.note { color: var(--muted); font-size: 13px; min-width: 16ch; }
tbody td:first-child { min-width: 17ch; }
small { color: var(--muted); font-size: 12px; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr)); gap: 18px;
  margin-top: 14px; align-items: start; }
section > h3 { margin-top: 22px; }
figure { margin: 0; padding: 14px 14px 8px; background: var(--panel); border: 1px solid var(--rule); border-radius: 8px;
  break-inside: avoid; }
.swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 8px; }
svg.plot { display: block; width: 100%; height: auto; max-width: 620px; font: 12px system-ui, -apple-system, "Segoe UI",
  Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif; font-variant-numeric: tabular-nums; }
svg .tick, svg .axis { fill: var(--muted); }
svg .label { fill: var(--ink); }
svg .rule, svg .phase { stroke: var(--rule); stroke-width: 1; }
svg .phase { stroke: var(--muted); stroke-dasharray: 2 3; }
svg .leader { stroke-width: 1; }
svg .limit { stroke: var(--ink); stroke-width: 2; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .dashed { stroke-dasharray: 6 4; }
svg .range { stroke-width: 1.2; opacity: .65; }
svg .segment { stroke: var(--panel); stroke-width: 1; }
dl { display: grid; grid-template-columns: minmax(150px, max-content) 1fr; gap: 4px 18px; font-size: 13px;
  margin: 8px 0; }
dt { color: var(--ink); }
dd { margin: 0; color: var(--muted); overflow-wrap: anywhere; }
@media (max-width: 640px) { body { padding: 18px 14px 40px; } dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: 6px; } h1 { font-size: 23px; } figure { padding: 10px 8px 4px; } }
@media print { body { max-width: none; padding: 0; font-size: 11pt; } .scroll { overflow: visible; }
  .grid { grid-template-columns: 1fr 1fr; } h2, tr { break-inside: avoid; } h2 { break-after: avoid; }
  table { font-size: 9pt; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
