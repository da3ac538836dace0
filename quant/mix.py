"""Chooses the format of each tensor: the least total KL divergence for a size, or the least size for a KL divergence.

Divergences of single tensors are taken to add up, as small ones do to second order. Every choice is the best one for
some price of a byte; which price is found by bisection.

Source: Everett 1963, doi 10.1287/opre.11.3.399 (Lagrange multipliers for allocation).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from quant.recipe import WeightFormat

PRICES = (1e-18, 1.0)  # nats a byte
NUM_HALVINGS = 80


@dataclass(frozen=True, slots=True)
class Option:
    """One format of a tensor: what it takes, and the KL divergence in nats that it alone costs."""

    form: WeightFormat
    num_bytes: int
    kl_nats: float


Mix = dict[str, Option]


def total_bytes(mix: Mapping[str, Option]) -> int:
    """Bytes of all tensors."""
    return sum(option.num_bytes for option in mix.values())


def total_kl(mix: Mapping[str, Option]) -> float:
    """The predicted KL divergence in nats."""
    return sum(option.kl_nats for option in mix.values())


def within_bytes(options: Mapping[str, Sequence[Option]], max_bytes: int) -> Mix | None:
    """The mix of least divergence among those of at most so many bytes; None where there is none."""
    if total_bytes(_at_price(options, PRICES[1])) > max_bytes:
        return None
    low, high = PRICES
    for _ in range(NUM_HALVINGS):
        middle = (low * high) ** 0.5
        is_small = total_bytes(_at_price(options, middle)) <= max_bytes
        low, high = (low, middle) if is_small else (middle, high)
    return _at_price(options, high)


def within_kl(options: Mapping[str, Sequence[Option]], max_kl: float) -> Mix | None:
    """The smallest mix of at most so much divergence; None where there is none."""
    if total_kl(_at_price(options, PRICES[0])) > max_kl:
        return None
    low, high = PRICES
    for _ in range(NUM_HALVINGS):
        middle = (low * high) ** 0.5
        is_close = total_kl(_at_price(options, middle)) <= max_kl
        low, high = (middle, high) if is_close else (low, middle)
    return _at_price(options, low)


def _at_price(options: Mapping[str, Sequence[Option]], price: float) -> Mix:
    """Each tensor's best option where a byte costs so many nats."""
    return {
        name: min(mine, key=lambda option: (option.kl_nats + price * option.num_bytes, option.num_bytes))
        for name, mine in options.items()
    }
