import pytest

from profiles import ProfileError, parse_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "amount"),
    [
        ("4096", 4096),
        ("4096 B", 4096),
        ("6 GiB", 6 * GIB),
        ("6gib", 6 * GIB),
        ("1.5 GiB", 3 * GIB // 2),
        ("0.1 GiB", 107_374_182),
        ("2,560 MiB", 2560 * 2**20),
        (" 800 MB ", 800_000_000),
        ("2 kB", 2000),
        ("2 KiB", 2048),
        ("1 TiB", 2**40),
        ("9007199254740993", 2**53 + 1),  # no way through a float
    ],
)
def test_amounts(text: str, amount: int) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1 GiB", "1,5 GiB", "1e9", "6 G", "6 GiBs", "nan", "0x10", "6  GiB", "٦ GiB", "9" * 5000, "6\n7"],
)
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(ProfileError, match="is no amount of memory; write it like '6 GiB', '512 MiB' or '4096'"):
        parse_bytes(text)
