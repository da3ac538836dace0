"""What a report says: projections by their formula, labels that must be there, values that page and JSON share."""

import argparse
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from edge.bench.figures import figure
from edge.bench.kv_effect import KVEffect
from edge.bench.memory_curve import END, MAX_POINTS, MemoryCurve, Sample, cgroup_file, thinned
from edge.bench.workload import Workload
from edge.report import fits
from edge.report.content import build_report, cpu_name, printable
from edge.report.fits import Fit, fit, residency
from edge.report.measure import Measured, Sizes, conditional_acceptance
from edge.report.page import render_page, summary
from edge.report.projection import AT_MOST, NO_INT8, NO_PRODUCTS, NO_SPEEDS, NO_STORAGE, SCALED, Efficiency, project
from edge.report.projection import nearest as nearest_share
from edge.report.subject import Subject, subject_of
from edge.report.text import kv_effect_cells, render_text
from profiles import MODELS
from runtime.errors import EdgeError, MemoryBudgetError
from runtime.manifest import read_manifest
from tests.pictures import parsed
from tests.report_fakes import MIB, MemoryPart, fake_plan, stated_profile

SIZES = Sizes(prompts=(128, 512), contexts=(128, 2048, 8192), num_cold_tokens=1)
HERE = stated_profile("laptop")
FAST: dict[str, Any] = {
    "memory_gb_per_s": 20.0,
    "int8_tops": 1.0,
    "storage_gb_per_s": 0.5,
    "device_memory_bytes": 8192 * MIB,
}


@pytest.fixture(autouse=True)
def _made_up_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fits, "memory_plan", fake_plan)


def options(**given: Any) -> argparse.Namespace:
    names = ("artifact", "dummy", "model", "bits", "block_size", "layout")
    return argparse.Namespace(**dict.fromkeys(names) | {"quiet": True} | given)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return subject_of(options(model="E2B"))


def projected(subject: Subject, efficiency: Efficiency | None = None, **stated: Any) -> dict[str, Any]:
    entry = fit(subject, stated_profile("device", **stated))
    return project(subject, entry, efficiency or Efficiency(), SIZES.contexts, SIZES.prompts)


# what a forward reads and computes


@pytest.mark.parametrize("bits", [4, 16])
def test_bytes_of_sizes_are_those_of_an_export(bits: int, tiny_artifact: Callable[..., Path]) -> None:
    manifest = read_manifest(tiny_artifact("wide", bits))
    stored, planned = Workload.of(manifest), Workload.of_sizes(manifest.model, bits, 32)
    num_matrices = 12 * len(manifest.model.layers) + 3
    # a matrix begins at a multiple of 4,096 bytes, its rows fill panels of 32; norms and scalars are floats
    assert 0 <= stored.weight_bytes - planned.weight_bytes < (4096 + 32 * 256 * 4) * num_matrices
    assert planned.operations(3, 2) == stored.operations(3, 2)


def test_e2b_reads_what_is_known_of_it(subject: Subject) -> None:
    plan = fake_plan("E2B", HERE)
    workload = subject.workload(plan)
    assert workload.operations(1, 1) / 2 == pytest.approx(1.863e9 + 403e6, rel=0.01)  # weights of layers and head
    assert workload.weight_bytes == 1_302_847_488  # decoder.onnx.data and token_table.bin of a dummy, blocks of 32
    # 6 KiB a token in three full layers, 6 MiB in twelve windows of 512
    assert workload.kv_bytes(8192, 2) == 8192 * 6 * 1024 + 6 * MIB
    assert workload.kv_bytes(128, 2) == 128 * (6 * 1024 + 6 * MIB // 512)


# projections


def test_a_forward_takes_as_long_as_the_slower_of_memory_and_arithmetic(subject: Subject) -> None:
    workload = subject.workload(fake_plan("E2B", HERE))
    num_bytes = workload.weight_bytes + workload.kv_bytes(2048, 2)
    by_memory = projected(subject, **FAST)
    assert by_memory["decode"][1]["tokens_per_s"] == pytest.approx(20e9 / num_bytes)
    assert by_memory["decode"][1]["bound_by"] == "memory"
    by_arithmetic = projected(subject, **FAST | {"int8_tops": 0.01})
    assert by_arithmetic["decode"][1]["tokens_per_s"] == pytest.approx(0.01e12 / workload.operations(1, 1))
    assert by_arithmetic["decode"][1]["bound_by"] == "arithmetic"
    # four chunks of 128
    seconds = 4 * max(workload.operations(128, 1) / 1e12, workload.weight_bytes / 20e9)
    assert by_memory["prefill"][1]["first_token_s"] == pytest.approx(seconds)
    assert by_memory["prefill"][1]["tokens_per_s"] == pytest.approx(512 / seconds)


def test_without_a_measurement_a_projection_is_a_bound(subject: Subject) -> None:
    found = projected(subject, **FAST)
    assert (found["projected"], found["at_most"], found["basis"]) == (True, True, AT_MOST)
    assert all(entry["share"] == 1 for entry in found["decode"] + found["prefill"])


def test_a_measured_share_of_the_roofline_scales_it(subject: Subject) -> None:
    efficiency = Efficiency({128: 0.8, 2048: 0.5}, {512: 0.25})
    scaled, bound = projected(subject, efficiency, **FAST), projected(subject, **FAST)
    assert (scaled["at_most"], scaled["basis"]) == (False, SCALED)
    for name, shares in (("decode", [0.8, 0.5, 0.5]), ("prefill", [0.25, 0.25])):
        pairs = zip(scaled[name], bound[name], shares, strict=True)
        assert all(a["tokens_per_s"] == pytest.approx(b["tokens_per_s"] * share) for a, b, share in pairs)


def test_the_nearest_measured_size_counts_by_ratio() -> None:
    shares = {128: 0.9, 2048: 0.5}
    assert [nearest_share(shares, size) for size in (1, 128, 511, 513, 10**6)] == [0.9, 0.9, 0.9, 0.5, 0.5]
    assert nearest_share({}, 128) == 1


def test_weights_that_do_not_stay_are_read_from_storage(subject: Subject) -> None:
    # of 2 GiB a quarter is the system's; 174 MiB are allocated, 1,430 MiB are weights: 68 MiB are missing
    stated = FAST | {"device_memory_bytes": 2048 * MIB, "context_tokens": 4096}
    entry = fit(subject, stated_profile("device", **stated))
    stays = residency(entry)
    assert (stays["stays"], stays["reserve_bytes"]) == (False, 512 * MIB)
    assert stays["missing_bytes"] == (1430 + 174 - 1536) * MIB
    assert stays["note"] == "71 MB of weights do not stay in memory"
    found = projected(subject, **stated)
    assert {point["bound_by"] for point in found["decode"]} == {"storage"}
    assert found["decode"][0]["tokens_per_s"] == pytest.approx(0.5e9 / stays["missing_bytes"])
    report = build_report(subject, [stated_profile("device", **stated)], None, HERE, SIZES, "c")
    assert "decode is bound by storage: 71 MB of weights do not stay" in render_text(report)
    assert "decode is bound by storage" in render_page(report)


def test_what_is_not_stated_is_said(subject: Subject) -> None:
    found = projected(subject)
    assert (found["note"], found["decode"], found["prefill"]) == (NO_SPEEDS, [], [])
    found = projected(subject, **FAST | {"storage_gb_per_s": None, "device_memory_bytes": 2048 * MIB})
    assert (found["note"], found["decode"]) == (NO_STORAGE, [])
    found = projected(subject, **FAST | {"int8_tops": None})
    assert (found["note"], len(found["decode"]), found["prefill"]) == (NO_PRODUCTS, 3, [])
    found = projected(subject, **FAST | {"device_memory_bytes": None})
    assert found["residency"]["stays"] is None
    assert "add device_memory" in found["residency"]["note"]


def test_int8_rates_say_nothing_of_float_products() -> None:
    floats = subject_of(options(model="E2B", bits=16))
    found = projected(floats, **FAST)
    assert (found["note"], found["prefill"]) == (NO_INT8, [])
    assert {point["bound_by"] for point in found["decode"]} == {"memory"}


def test_contexts_that_do_not_fit_are_not_projected(subject: Subject) -> None:
    # (162 - 150) MiB have room for 2,048 tokens of 6 KiB
    found = projected(subject, **FAST | {"memory_budget_bytes": 162 * MIB, "context_tokens": 1024})
    assert [point["context_tokens"] for point in found["decode"]] == [128, 2048]


def test_a_device_that_is_too_small_is_a_verdict_and_no_error(subject: Subject) -> None:
    small = stated_profile("small", **FAST | {"memory_budget_bytes": 100 * MIB})
    assert fit(subject, small).reason == "small: needs 150 MiB, has 100 MiB; <raise> the budget"
    report = build_report(subject, [small, stated_profile("other", **FAST)], None, HERE, SIZES, "c")
    verdict = report["verdict"][0]
    assert (verdict["fits"], verdict["decode_tokens_per_s"], verdict["note"]) == (False, None, "does not fit")
    assert "small: small: needs 150 MiB" in render_text(report)
    assert "&lt;raise&gt; the budget" in render_page(report)
    assert "fits 1 of 2 device profiles" in summary(report)


def test_an_error_without_a_plan_stays_one(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        error = MemoryBudgetError("no budget at all")
        error.plan = None  # type: ignore[attr-defined, unused-ignore]
        raise error

    monkeypatch.setattr(fits, "memory_plan", fail)
    with pytest.raises(MemoryBudgetError, match="no budget at all"):
        fit(subject, HERE)


# measured values


@pytest.mark.parametrize("num_drafts", [1, 3, 7])
@pytest.mark.parametrize("p", [0.0, 0.3, 0.72, 1.0])
def test_acceptance_of_a_draft_follows_from_that_of_all(p: float, num_drafts: int) -> None:
    rate = sum(p**place for place in range(1, num_drafts + 1)) / num_drafts
    assert conditional_acceptance(rate, num_drafts) == pytest.approx(p, abs=1e-6)


def test_a_curve_keeps_its_peaks_and_leaves_out_what_is_outside() -> None:
    curve = MemoryCurve()
    curve.samples = [Sample(10 + place / 100, place == 777, place, None) for place in range(1000)]
    phases = [{"name": "load", "clock_s": 11.0}, {"name": "decode", "clock_s": 15.0}, {"name": END, "clock_s": 18.0}]
    found = curve.to_json(phases)
    assert len(found["seconds"]) == len(found["anonymous"]) == len(found["mapped"]) == MAX_POINTS
    assert (found["cgroup"], max(found["anonymous"]), max(found["mapped"])) == (None, 1, 799)
    assert found["phases"] == [{"name": "load", "seconds": 0}, {"name": "decode", "seconds": 4}]
    assert found["seconds"][0] >= 0 and found["seconds"][-1] < 7
    assert (curve.peak_anonymous(11, 15), curve.peak_anonymous(15, 18)) == (0, 1)
    assert thinned([]) == [] and thinned([3, None]) is None and thinned([3, 1]) == [3, 1]


@pytest.mark.parametrize(
    ("membership", "file"),
    [
        ("0::/a/b\n", "sys/fs/cgroup/a/b/memory.current"),
        ("0::/elsewhere\n", "sys/fs/cgroup/memory.current"),
        ("5:cpu:/x\n3:memory,other:/job\n", "sys/fs/cgroup/memory/job/memory.usage_in_bytes"),
    ],
)
def test_a_control_groups_own_file_is_found(membership: str, file: str, tmp_path: Path) -> None:
    assert cgroup_file(tmp_path) is None
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(membership)
    assert cgroup_file(tmp_path) is None
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text("123\n")
    assert cgroup_file(tmp_path) == tmp_path / file


def test_the_processors_name_is_told(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text("processor : 0\nmodel name\t: Some CPU: fast\n")
    assert cpu_name(file) == "Some CPU: fast"
    assert cpu_name(tmp_path / "none")


def measured_figures() -> tuple[Any, ...]:
    """One figure of each kind, and one that could not be taken."""
    return (
        figure("roofline.stream", "stream bandwidth", "GB/s", [30.0, 33.0]),
        figure("roofline.product", "int8 product rate", "GOP/s", [900.0]),
        figure("first_token.128", "time to first token", "ms", [400.0, 410.0]),
        figure("first_token.512", "time to first token", "ms", [1190.0]),
        figure("prefill.128", "prefill", "tokens/s", [311.0], limit_share=0.7),
        figure("prefill.512", "prefill", "tokens/s", [431.0], limit_share=0.8),
        figure("decode.128", "decode", "tokens/s", [21.5, 20.1, 22.0], limit_share=0.79),
        figure("decode.2048", "decode", "tokens/s", [19.7], limit_share=0.72),
        figure("decode.8192", "decode", "tokens/s", [], note="the context holds 4,096 tokens"),
        figure("drafted.128.0.7", "decode with drafts", "tokens/s", [41.0], simulated=True),
        figure("drafted.2048.0.7", "decode with drafts", "tokens/s", [33.3], simulated=True),
        *(figure(f"{name}.{kind}", name, "ms", [1.5]) for name in ("token", "ple_row") for kind in ("cold", "warm")),
        figure("load.cold", HOSTILE, "s", [0.76], note=HOSTILE),
    )


HOSTILE = "<script>alert(\"1\")</script> & 'x'"


def measured(acceptances: tuple[float, ...] = (0.7,), **curve: Any) -> Measured:
    found = {"seconds": [0.0, 1.0, 2.0], "anonymous": [1e6, 9e7, 3e8], "mapped": [1e6, 1e9, 1e9], "cgroup": None}
    memory = {
        "context": 2048,
        "loading_anonymous": 150 * MIB,
        "prefill_anonymous": 260 * MIB,
        "decode_anonymous": 170 * MIB,
        "decode_mapped": 1365 * MIB,
        "curve": found | {"phases": [{"name": "load", "seconds": 0.0}]} | curve,
    }
    setup: dict[str, Any] = {
        "profile": "laptop",
        "layout": "native",
        "instruction_set": "avx2",
        "num_threads": 2,
        "context_tokens": 4096,
        "prefill_chunk_tokens": 512,
        "num_passes": 3,
        "cold_context_tokens": 128,
        "swap_total_bytes": 0,
        "swap_used_bytes": 0,
    }
    return Measured(measured_figures(), memory, acceptances, "assumed", setup)


class Page(HTMLParser):
    """Checks that every element is closed in its place; collects texts, rows by key and the pictures."""

    VOID = ("meta", "br")

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.rows: dict[str, list[str]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._row: list[str] | None = None
        self.feed(html)
        self.close()
        assert self.open == []
        self.pictures = re.findall(r"<svg .*?</svg>", html, re.S)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append((tag, given))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self._row = self.rows.setdefault(given["data-key"] or "", []) if "data-key" in given else None
        if tag == "td" and self._row is not None:
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._row:
            self._row[-1] += data


@pytest.fixture
def report(subject: Subject) -> dict[str, Any]:
    profiles = [stated_profile("phone", **FAST), stated_profile("bare"), stated_profile(HOSTILE, **FAST)]
    return build_report(subject, profiles, measured(), HERE, SIZES, f"edge-report {HOSTILE}")


def test_the_page_is_whole_and_stands_alone(report: dict[str, Any]) -> None:
    html = render_page(report)
    page = Page(html)
    assert len(page.pictures) == 11
    for picture in page.pictures:
        parsed(picture)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object"}
    assert not any(attribute in ("src", "href", "style", "onclick") for _, given in page.tags for attribute in given)
    assert "http" not in html
    assert "<script" not in html and "NaN" not in html and "inf" not in re.findall(r"[0-9>](inf)\b", html)
    assert html.count("&lt;script&gt;alert") >= 5


def test_the_pages_numbers_are_those_of_the_json(report: dict[str, Any]) -> None:
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    rows = Page(render_page(report)).rows
    figures = report["measured"]["figures"]
    assert {key for key in rows if not key.startswith("projection.")} == set(figures)
    for key, found in figures.items():
        value = "-" if found["value"] is None else format(found["value"], ",.0f" if found["value"] >= 100 else ".2f")
        cell = rows[key][1]
        assert cell == value or float(cell.replace(",", "")) == pytest.approx(found["value"], rel=0.005)
    assert rows["decode.8192"][1:] == ["-", "tokens/s", "", "", "the context holds 4,096 tokens"]
    assert rows["decode.128"][1:5] == ["21.5", "tokens/s", "20.1 - 22.0", "79%"]
    phone = report["projections"][0]
    cells = rows["projection.phone"]
    assert cells[1:4] == ["20", "1", "0.5"]
    for cell, point in zip(cells[4:7], phone["decode"], strict=True):
        bound = f"{point['bound_by']}-bound"
        assert float(cell.removesuffix(bound)) == pytest.approx(point["tokens_per_s"], rel=0.01)
        assert cell.endswith(bound)


def test_what_is_not_measured_is_labelled(report: dict[str, Any]) -> None:
    html, text = render_page(report), render_text(report)
    assert all(entry["projected"] is True for entry in report["projections"])
    rows = Page(html).rows
    for key, found in report["measured"]["figures"].items():
        assert ("SIMULATED" in rows[key][0]) == found["simulated"]
    for picture in ("PROJECTION: decode", "PROJECTION: prefill"):
        assert f'aria-label="{picture}"' in html
    assert "ACCEPTANCE ASSUMED: speeds with drafts are SIMULATED" in html
    assert "drafts, SIMULATED P=0.7" in html
    assert html.count("tokens/s, projected</text>") == 2
    lines = {line.split()[0]: line for line in text.splitlines() if line.startswith(("this machine", "phone", "bare"))}
    assert lines["this"].endswith("measured") and "19.7 tokens/s at 2,048" in lines["this"]
    assert lines["phone"].endswith("PROJECTION")
    assert lines["bare"].endswith(NO_SPEEDS) and "PROJECTION" not in lines["bare"]
    assert "PROJECTION: computed, not measured" in text
    assert "swap off" in html


def test_kv_effect_without_a_drafter_tells_no_acceptance() -> None:
    effect = KVEffect("int8", 8192, 512, 1.26e-4, 0.0123, 0.998, None, None, (96, 17), (96, 96))
    cells = kv_effect_cells(effect.to_json())
    assert cells == ("int8", "0.00013", "0.012", "99.8%", "-", "1 of 2 prompts", "113 of 192")


def test_acceptance_of_prompts_is_not_called_assumed(subject: Subject) -> None:
    found = measured()
    found = Measured(found.figures, found.memory, (0.7,), "measured on the prompts", found.setup)
    html = render_page(build_report(subject, [stated_profile("phone", **FAST)], found, HERE, SIZES, "c"))
    assert "ACCEPTANCE FROM PROMPTS: speeds with drafts are SIMULATED" in html
    assert "with probability P, measured on the prompts." in html
    assert "ACCEPTANCE ASSUMED" not in html


def test_planned_and_measured_memory_stand_together(report: dict[str, Any]) -> None:
    pairs = {pair["key"]: pair for pair in report["measured"]["planned_and_measured"]}
    planned = fake_plan("E2B", HERE, context_tokens=2048)
    assert pairs["steady"]["planned_bytes"] == planned.anonymous_bytes == 162 * MIB
    assert pairs["steady"]["measured_bytes"] == 260 * MIB
    assert pairs["steady"]["error_percent"] == pytest.approx(100 * (162 / 260 - 1))
    assert pairs["mapped"]["error_percent"] == pytest.approx(100 * (1430 / 1365 - 1))
    html = render_page(report)
    for part in planned.parts:
        assert re.search(rf"{part.name}</td><td[^>]*>{part.kind}<", html), part
    assert "-38 %" in html and "-38 %" in render_text(report)


def test_parts_are_shown_whatever_they_are_called(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = tuple(MemoryPart(f"part <{index}>", (index + 1) * MIB, "anonymous") for index in range(12))

    def plan(*arguments: Any, **given: Any) -> Any:
        found = fake_plan(*arguments, **given)
        object.__setattr__(found, "parts", parts)
        return found

    monkeypatch.setattr(fits, "memory_plan", plan)
    html = render_page(build_report(subject, [stated_profile("phone", **FAST)], None, HERE, SIZES, "c"))
    page = Page(html)
    assert sum(tag == "rect" for tag, _ in page.tags) == 12
    assert all(f"part &lt;{index}&gt;" in html for index in range(12))


def test_a_system_that_tells_nothing_of_memory_has_no_curve(subject: Subject) -> None:
    found = measured(seconds=[], anonymous=[], mapped=[], cgroup=[])
    html = render_page(build_report(subject, [stated_profile("phone", **FAST)], found, HERE, SIZES, "c"))
    assert "Memory over time" not in html and "memory over time</h3>" not in html


def test_without_weights_there_is_plan_and_projection_only(subject: Subject) -> None:
    report = build_report(subject, [stated_profile("phone", **FAST)], None, HERE, SIZES, "c")
    assert report["measured"] is None
    html, text = render_page(report), render_text(report)
    assert "PLAN AND PROJECTION ONLY: nothing was measured" in html
    assert "Measured on this machine" not in html
    assert "this machine" not in [entry["where"] for entry in report["verdict"]]
    assert "PROJECTION, at most" in text and re.search("at most [0-9.]+ tokens/s at 2,048", text)
    assert re.search("at least [0-9.]+ s for 512", text), "a bound on speed is a least time"


def test_texts_that_no_page_can_show_are_replaced() -> None:
    mark = "\N{REPLACEMENT CHARACTER}"
    assert printable({"a": ["b\udcff\x00", 1.5, None], "c": True}) == {"a": [f"b{mark}{mark}", 1.5, None], "c": True}
    json.dumps(printable({"a": "\udcff"}), ensure_ascii=False).encode()


# subjects


@pytest.mark.parametrize("name", MODELS)
def test_a_model_needs_no_weights(name: str) -> None:
    found = subject_of(options(model=name, bits=8, block_size=128))
    assert (found.kind, found.source, found.manifest, found.bits) == ("model", name, None, 8)
    assert math.isfinite(found.workload(fake_plan(name, HERE, bits=8)).weight_bytes)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"model": "E2B", "bits": 5}, "--bits 5: choose one of 4, 8, 16, 32"),
        ({"model": "E2B", "block_size": 33}, "--block-size 33: choose one of 16, 32, 64, 128, 256"),
        ({"artifact": "none"}, "none: No such file or directory; make an artifact with edge-export"),
        ({"artifact": "none", "bits": 4}, "--bits is for --dummy"),
    ],
)
def test_subjects_that_are_none(given: dict[str, Any], match: str) -> None:
    with pytest.raises(EdgeError, match=match):
        subject_of(options(**given))


def test_an_artifacts_products_are_what_its_recipe_says(tiny_artifact: Callable[..., Path]) -> None:
    for activations, is_int8 in (("int8", True), ("float32", False)):
        found = subject_of(options(artifact=str(tiny_artifact("wide", 4, activations))))
        entry = Fit(HERE, fake_plan(found.source, HERE))
        assert found.is_int8(entry.plan) == is_int8
        assert found.workload(entry.plan) == Workload.of(read_manifest(found.artifact))
