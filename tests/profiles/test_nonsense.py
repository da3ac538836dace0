"""Whatever a user's file holds and is called: a profile, or one line that says what is wrong (48 to 53)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from profiles import ProfileError, load_profile
from tests.profile_files import LINES, refuses, write

NONSENSE = {
    "true": "true",
    "float": "3.75",
    "minus": "-1",
    "nan": "nan",
    "inf": "-inf",
    "overflow": "1e400",
    "huge": str(10**40),
    "hexadecimal": f"0x{'f' * 5000}",
    "digits": "9" * 5000,
    "empty": '""',
    "text": '"nonsense"',
    "long": f'"{"x" * 5000}"',
    "lines": '"a\\nb\\u2028c\\u0000"',
    "unicode": '"größe 💾"',
    "date": "1979-05-27",
    "moment": "1979-05-27T07:32:00.999999-07:00",
    "time": "07:32:00",
    "list": "[]",
    "lists": "[[[]], [{a = 1}]]",
    "many": f"[{', '.join(map(str, range(2000)))}]",
    "huge-list": f"[0x{'f' * 5000}]",
    "mixed": '["CPUExecutionProvider", 5, nan]',
    "table": "{}",
    "tables": "{a = {b = {c = 1}}, d = [1]}",
}
KEYS = [*LINES, "device_memory", "memory_fraction", "memory_gb_per_s", "int8_tops", "storage_gb_per_s"]
TEXTS = {"empty", "text", "long", "unicode"}  # a description may be any of these
CHANGES = [(key, case) for key in KEYS for case in NONSENSE if key != "description" or case not in TEXTS]
FITTING = {("int8_tops", "float"), ("memory_gb_per_s", "float"), ("storage_gb_per_s", "float")}


@pytest.mark.parametrize(("key", "case"), [change for change in CHANGES if change not in FITTING])
def test_nonsense_is_refused_in_one_line_that_names_the_key(tmp_path: Path, key: str, case: str) -> None:
    changes: dict[str, str | None] = {"memory_budget": None} if key == "memory_fraction" else {}
    path = write(tmp_path, **changes | {key: NONSENSE[case]})
    with pytest.raises(ProfileError) as caught:
        load_profile(path)
    line = str(caught.value)
    assert line.startswith("profile mine.toml: ")
    assert key in line
    assert len(line.splitlines()) == 1
    assert len(line) < 700  # the longest lists the providers


def test_a_table_and_a_dotted_key_are_values_too(tmp_path: Path) -> None:
    refuses(write(tmp_path, num_threads=None, **{"num_threads.a": "1"}), "num_threads is {'a': 1}, expected an integer")
    refuses(write(tmp_path, **{'"num\\nthreads"': "1"}), r"unknown key 'num\\nthreads', did you mean 'num_threads'")


def test_a_number_of_too_many_digits_shows_its_line(tmp_path: Path) -> None:
    refuses(write(tmp_path, num_threads="9" * 5000), r"'num_threads = 9999.*' has a number of too many digits")


# Names of files (53)


@pytest.mark.parametrize("name", ["größe 💾.toml", "with space.toml", "a" * 250 + ".toml"])
def test_any_name_of_a_file(tmp_path: Path, name: str) -> None:
    path = write(tmp_path).rename(tmp_path / name)
    assert load_profile(path).name == path.stem
    path.write_text("x = 1\n")
    refuses(str(path), f"profile {name}: unknown key 'x'; known keys are description")


def test_a_name_of_two_lines(tmp_path: Path) -> None:
    path = write(tmp_path).rename(tmp_path / "a\nb.toml")
    refuses(path, r"profile 'a\\nb.toml': name is 'a\\nb', expected a string of one line")
    refuses(str(tmp_path / "c\nd.toml"), r"c\\nd.toml': no such profile file")


def test_a_name_longer_than_the_system_allows(tmp_path: Path) -> None:
    refuses(str(tmp_path / ("a" * 5000 + ".toml")), "aaa.toml: no such profile file; known profiles are gpu")
    refuses("a" * 5000, "unknown profile 'aaa.*aaa'; known profiles are gpu")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    monkeypatch.setattr(Path, "open", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Permission denied")))
    refuses(path, "profile mine.toml: cannot be read: Permission denied")


@pytest.mark.parametrize("environment", [{}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_the_c_locale(tmp_path: Path, environment: dict[str, str]) -> None:
    path = write(tmp_path, description='"größer"').rename(tmp_path / "größe.toml")
    program = (
        "import sys; from profiles import load_profile; p = load_profile(sys.argv[1]); print(ascii(p.description))\n"
        "try: load_profile(sys.argv[1] + 'x.toml')\nexcept ValueError as error: print(error, file=sys.stderr)"
    )
    root = str(Path(__file__).parents[2])
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": root, "LC_ALL": "C"} | environment
    done = subprocess.run([sys.executable, "-c", program, path], env=environment, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == b"'gr\\xf6\\xdfer'\n"
    assert done.stderr.count(b"\n") == 1
    assert b".tomlx.toml: no such profile file" in done.stderr
