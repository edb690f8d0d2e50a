"""One line of a table of claims: what was measured, what was promised, and whether it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...pipelines.evaluation.metrics import wilson_interval


@dataclass(frozen=True)
class Claim:
    """One line: what was measured, its value, and what was promised."""

    name: str
    value: float
    text: str
    passed: bool


def rate_text(hits: Sequence[bool]) -> str:
    """The rate of hits and its 95 % interval (Wilson)."""
    low, high = wilson_interval(sum(hits), len(hits))
    return f"{sum(hits) / len(hits):6.1%} of {len(hits)} (95 % interval {low:.1%} to {high:.1%})"


def share(name: str, hits: Sequence[bool], floor: float) -> Claim:
    rate = sum(hits) / len(hits)
    return Claim(name, rate, f"{rate_text(hits)}, wanted {floor:.0%}", rate >= floor)


def paired(difference: Tensor, digits: int = 2) -> str:
    """The mean of paired differences [N] and its 95 % interval."""
    mean, error = float(difference.mean()), float(difference.std()) / len(difference) ** 0.5
    return f"{mean:+.{digits}f} ({mean - 1.96 * error:+.{digits}f} to {mean + 1.96 * error:+.{digits}f})"


def print_claims(claims: Sequence[Claim]) -> bool:
    for claim in claims:
        print(f"{'ok  ' if claim.passed else 'FAIL'} {claim.name:<36} {claim.text}", flush=True)
    return all(claim.passed for claim in claims)
