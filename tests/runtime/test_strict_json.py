import pytest

from runtime.errors import ArtifactError
from runtime.strict_json import integer, object_of, parse


def test_plain_values_are_read() -> None:
    assert parse(b'{"a": [1, 2.5, "\\u00e9", null, true]}') == {"a": [1, 2.5, "é", None, True]}


def test_many_keys_and_one_twice_is_no_long_search() -> None:
    keys = ",".join(f'"{number}":0' for number in (*range(100_000), 99_999))
    with pytest.raises(ArtifactError, match="key '99999' is there 2 times"):
        parse(f"{{{keys}}}".encode())


def test_an_object_has_exactly_its_names() -> None:
    assert object_of({"a": 1}, "files", ["a"]) == {"a": 1}
    with pytest.raises(ArtifactError, match="files lacks 'b'"):
        object_of({"a": 1}, "files", ["a", "b"])
    with pytest.raises(ArtifactError, match="files has the unknown key 'a'"):
        object_of({"a": 1, "b": 1}, "files", ["b"])


def test_an_integer_has_a_range() -> None:
    assert integer(2**63 - 1, "size", 0) == 2**63 - 1
    for value in (2**63, 0, True, 1.0):
        with pytest.raises(ArtifactError, match=r"size is .*, expected an integer of 1 to 2"):
            integer(value, "size", 1)


def test_a_hostile_value_is_shortened() -> None:
    with pytest.raises(ArtifactError) as caught:
        integer("\n" * 1_000_000, "size", 1)
    assert len(str(caught.value)) < 250
    assert "\n" not in str(caught.value)
