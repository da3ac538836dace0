import pytest

from quant.mix import Option, total_bytes, total_kl, within_bytes, within_kl
from quant.recipe import WeightFormat

SMALL, LARGE = WeightFormat(4, 32), WeightFormat(8, 32)
OPTIONS = {
    "costly": (Option(SMALL, 100, 0.5), Option(LARGE, 200, 0.0)),
    "cheap": (Option(SMALL, 100, 0.01), Option(LARGE, 200, 0.0)),
}


def forms(mix):
    return {name: option.form for name, option in mix.items()}


def test_bytes_go_where_they_save_most():
    assert forms(within_bytes(OPTIONS, 300)) == {"costly": LARGE, "cheap": SMALL}
    assert forms(within_kl(OPTIONS, 0.02)) == {"costly": LARGE, "cheap": SMALL}


@pytest.mark.parametrize("limit", [200, 250, 300, 399, 400, 10_000])
def test_a_limit_of_bytes_is_kept(limit):
    assert total_bytes(within_bytes(OPTIONS, limit)) <= limit


@pytest.mark.parametrize("limit", [0.001, 0.01, 0.5, 1.0])
def test_a_limit_of_divergence_is_kept(limit):
    assert total_kl(within_kl(OPTIONS, limit)) <= limit


def test_what_cannot_be_kept_has_no_mix():
    assert within_bytes(OPTIONS, 199) is None
    assert within_kl({"one": (Option(SMALL, 1, 0.5),)}, 0.1) is None
