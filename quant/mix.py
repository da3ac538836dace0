"""Chooses the format of each tensor: the least total KL divergence for a size, or the least size for a KL divergence.

Divergences of single tensors are taken to add up, as small ones do to second order. Every choice is the best one for
some price of a byte; which price is found by bisection.

Source: Everett 1963, doi 10.1287/opre.11.3.399 (Lagrange multipliers for allocation).
"""

from collections.abc import Callable, Mapping, Sequence
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
    return _nearest(options, PRICES[1], PRICES[0], lambda mix: total_bytes(mix) <= max_bytes)


def within_kl(options: Mapping[str, Sequence[Option]], max_kl: float) -> Mix | None:
    """The smallest mix of at most so much divergence; None where there is none."""
    return _nearest(options, PRICES[0], PRICES[1], lambda mix: total_kl(mix) <= max_kl)


def _nearest(
    options: Mapping[str, Sequence[Option]], within: float, beyond: float, keeps: Callable[[Mix], bool]
) -> Mix | None:
    """The mix of the price nearest to `beyond` that keeps a limit; None where not even `within` does."""
    if not keeps(_at_price(options, within)):
        return None
    for _ in range(NUM_HALVINGS):
        middle = (within * beyond) ** 0.5
        within, beyond = (middle, beyond) if keeps(_at_price(options, middle)) else (within, middle)
    return _at_price(options, within)


def _at_price(options: Mapping[str, Sequence[Option]], price: float) -> Mix:
    """Each tensor's best option where a byte costs so many nats."""
    return {
        name: min(mine, key=lambda option: (option.kl_nats + price * option.num_bytes, option.num_bytes))
        for name, mine in options.items()
    }
