"""The report as plain values: all that the table, the page and the JSON show is in here, and nothing else is."""

import os
import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import psutil

from edge.bench.suite import machine
from edge.report.fits import Fit, fit, plan_json
from edge.report.measure import Measured, Sizes
from edge.report.projection import Efficiency, project
from edge.report.subject import Subject
from profiles import DeviceProfile, budget_bytes, cgroup_limit_bytes
from runtime import native

FORMAT_VERSION = 1
REFERENCE_CONTEXT, REFERENCE_PROMPT = 2048, 512  # of the speeds that the verdict names
DEFINITIONS = {
    "fits": "the planned peak of anonymous memory (load, and a full context) is within the profile's budget",
    "largest context": "tokens of prompt and answer that the budget has room for, at most what profile and model allow",
    "anonymous memory": "what the system cannot take back: heap and buffers, RssAnon; weights are mapped, not in it",
    "mapped memory": "resident pages of files, RssFile and RssShmem; the system may drop them and read them again",
    "control group": "what the whole group of this process takes, page cache included",
    "stream bandwidth": "bytes a second that all threads read together from a buffer far above every cache",
    "int8 product rate": "operations a second of an int8 product of prefill's size; a multiplication and an addition "
    "are two",
    "of limit": "least time by the two rates above over the time taken; the least reads each weight and KV row once",
    "time to first token": "from the call with a prompt of so many random tokens to its first token, greedy",
    "prefill": "prompt tokens over the time to first token",
    "decode": "forwards of one token a second behind a context of so many tokens; no drafts, no sampling",
    "decode with drafts": "tokens a second of the whole draft-verify loop; as many drafts as pay. All work is done, "
    "only which drafts stand is made up: SIMULATED",
    "acceptance": "probability that a draft stands where those before it do; ASSUMED unless measured on prompts",
    "KL": "KL(float32 rows || narrower rows) of the next token's distribution, in nats: 0 is no difference; at 0.01 "
    "tokens drawn with float32 rows are on geometric average 1 % less likely with the narrower",
    "PLE row from storage": "a forward of one token right after the pages of the PLE table were dropped from the page "
    "cache; the same token again reads it cached",
    "load": "seconds in a fresh process that need not verify digests; cold: files dropped from the page cache before",
    "planned": "the memory plan for the context that was measured; the error is (planned - measured) / measured",
    "PROJECTION": "computed, not measured: the slowest of bytes / memory_gb_per_s, operations / int8_tops and, where "
    "weights do not stay in memory, missing bytes / storage_gb_per_s, from what the profile states",
    "weights stay in memory": "the device's memory, less a quarter of it for its system and other programs, less the "
    "planned anonymous memory, holds the mapped weights",
    "figures": "medians; in brackets the smallest and the largest sample",
}


def build_report(
    subject: Subject,
    profiles: Sequence[DeviceProfile],
    measured: Measured | None,
    here: DeviceProfile,
    sizes: Sizes,
    command: str,
) -> dict[str, Any]:
    """Verdict, measurement, projections and what they mean.

    Args:
        measured: None without weights
        here: the profile that this machine was measured with
        command: the command line
    """
    efficiency = measured.efficiency(sizes) if measured else Efficiency()
    fits = [fit(subject, profile) for profile in profiles]
    projections = [project(subject, entry, efficiency, sizes.contexts, sizes.prompts) for entry in fits]
    verdict = [_verdict(entry, projected) for entry, projected in zip(fits, projections, strict=True)]
    if measured:
        verdict.insert(0, _verdict_here(fit(subject, here, memory_budget=budget_bytes(here)), measured))
    report = {
        "format_version": FORMAT_VERSION,
        "about": _about(subject) | {"command": command},
        "verdict": verdict,
        "measured": _measured(subject, here, measured) if measured else None,
        "projections": projections,
        "definitions": DEFINITIONS,
    }
    return cast("dict[str, Any]", printable(report))


def printable(value: Any) -> Any:
    """The same values; characters that no page can show, as names of files may have them, replaced in texts."""
    if isinstance(value, str):
        return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in value)
    if isinstance(value, Mapping):
        return {key: printable(entry) for key, entry in value.items()}
    return [printable(entry) for entry in value] if isinstance(value, list | tuple) else value


def _about(subject: Subject) -> dict[str, Any]:
    manifest = subject.manifest
    return {
        "title": subject.title,
        "kind": subject.kind,
        "source": str(subject.source),
        "recipe": None if manifest is None else manifest.recipe,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "num_logical_cores": os.cpu_count(),
        "num_physical_cores": psutil.cpu_count(logical=False),
        "memory_bytes": psutil.virtual_memory().total,
        "cgroup_limit_bytes": cgroup_limit_bytes(),
        "instruction_set": native.instruction_set(),
        **machine(),
    }


def cpu_name(file: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name where the system tells one."""
    try:
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return next((name for name in names if name), platform.processor() or platform.machine())


def _entry(entry: Fit) -> dict[str, Any]:
    return {
        "profile": entry.profile.name,
        "description": entry.profile.description,
        "model": entry.plan.model,
        "fits": entry.fits,
        "reason": entry.reason,
        "plan": plan_json(entry.plan),
    }


def _verdict_here(entry: Fit, measured: Measured) -> dict[str, Any]:
    speeds = {figure.key: figure for figure in measured.figures}
    context = _reference(_sizes_of(speeds, "decode"), REFERENCE_CONTEXT)
    prompt = _reference(_sizes_of(speeds, "first_token"), REFERENCE_PROMPT)
    decode, first = speeds.get(f"decode.{context}"), speeds.get(f"first_token.{prompt}")
    return _entry(entry) | {
        "where": "this machine",
        "speed_kind": "measured",
        "at_most": False,
        "decode_tokens_per_s": decode.value if decode else None,
        "decode_context_tokens": context,
        "first_token_s": first.value / 1e3 if first and first.value else None,
        "first_token_prompt_tokens": prompt,
        "note": "",
    }


def _verdict(entry: Fit, projected: Mapping[str, Any]) -> dict[str, Any]:
    decode = {found["context_tokens"]: found for found in projected["decode"]}
    prefill = {found["prompt_tokens"]: found for found in projected["prefill"]}
    context = _reference(list(decode), REFERENCE_CONTEXT)
    prompt = _reference(list(prefill), REFERENCE_PROMPT)
    stays = projected["residency"]
    storage = "decode is bound by storage: " + stays["note"] if stays["stays"] is False else ""
    return _entry(entry) | {
        "where": entry.profile.name,
        "speed_kind": "projected" if decode else None,
        "at_most": projected["at_most"],
        "decode_tokens_per_s": decode[context]["tokens_per_s"] if context else None,
        "decode_context_tokens": context,
        "first_token_s": prefill[prompt]["first_token_s"] if prompt else None,
        "first_token_prompt_tokens": prompt,
        "note": projected["note"] or (storage if context and decode[context]["bound_by"] == "storage" else ""),
    }


def _sizes_of(speeds: Mapping[str, Any], name: str) -> list[int]:
    keys = (key.split(".") for key, figure in speeds.items() if figure.value is not None)
    return [int(parts[1]) for parts in keys if parts[0] == name and len(parts) == 2]


def _reference(sizes: Sequence[int], wanted: int) -> int | None:
    """The wanted size, or the largest below it, or the smallest that there is."""
    below = [size for size in sizes if size <= wanted]
    return max(below) if below else min(sizes, default=None)


def _measured(subject: Subject, here: DeviceProfile, measured: Measured) -> dict[str, Any]:
    memory = measured.memory
    planned = fit(subject, here, context_tokens=memory["context"], memory_budget=budget_bytes(here))
    pairs = {
        "load": ("anonymous, load", planned.plan.load_peak_bytes, memory["loading_anonymous"]),
        "steady": (
            f"anonymous, prefill and decode at context {memory['context']:,}",
            planned.plan.anonymous_bytes,
            max(memory["prefill_anonymous"], memory["decode_anonymous"]),
        ),
        "mapped": ("mapped, decode", planned.plan.mapped_bytes, memory["decode_mapped"]),
    }
    return measured.to_json() | {
        "plan": plan_json(planned.plan),
        "planned_and_measured": [
            {
                "key": key,
                "what": what,
                "planned_bytes": due,
                "measured_bytes": found,
                "error_percent": 100 * (due - found) / found if found else None,
            }
            for key, (what, due, found) in pairs.items()
        ],
    }
