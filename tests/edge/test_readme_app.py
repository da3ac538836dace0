"""README's section for those who embed the runtime: a newcomer pastes its blocks one behind the other, and they run."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
SECTION = README.partition("\n## In your app\n")[2].partition("\n## ")[0]
BLOCKS = re.findall(r"^```python\n(.*?)^```$", SECTION, re.MULTILINE | re.DOTALL)


def test_the_blocks_of_readme_run(
    demo_artifact: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "demo-edge").symlink_to(demo_artifact(4))
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "readme"}
    printed = []
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README.md, block {number}", "exec"), names)
        printed.append(capsys.readouterr().out)
    assert len(BLOCKS) == SECTION.count("```") / 2 == 7
    conversation, streamed, acted, structured, saved, asked, cancelled = printed
    assert re.search(r" [1-9]\d* [1-9]\d*\n$", conversation)  # reused and prefilled
    assert re.search(r"(stop|length) \d+\.\d+\n$", streamed)
    assert acted.strip()
    assert structured in ("Python\n", "C\n", "other\n")
    assert saved == ""
    assert asked.strip()
    assert cancelled in ("cancelled\n", "stop\n", "length\n")
    assert (tmp_path / "chat.session").exists()


def test_the_section_shows_what_an_app_needs() -> None:
    code = "\n".join(BLOCKS)
    for name in ("conversation(", "piece.kind", ".act(", "json_schema(", ".save(", ".resume(", "asyncio", ".cancel"):
        assert name in code
