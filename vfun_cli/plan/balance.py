"""How evenly a plan loads the ranks, beside what independent draws would do."""

import numpy as np

from vfun_cli.plan.draws import random_words
from vfun_cli.plan.schedule import EpochPlan, FloatArray

SIMULATED_ROUNDS = 2000
"""Steps of the simulation; the ratio is stable to about 0.003 with 8 ranks."""


def planned_rounds(plan: EpochPlan) -> FloatArray:
    """FLOPs of each rank in every round, [rounds, ranks]; ranks meet at the end of a round.

    A round is one accumulation index of a step: sharded weights are gathered in each forward pass.
    """
    return plan.flops[plan.steps].reshape(-1, plan.world_size)


def independent_rounds(plan: EpochPlan, num_rounds: int, world_size: int, seed: int = 0) -> FloatArray:
    """The same if every rank drew its micro-batches on its own from this epoch's, [rounds, ranks]."""
    if len(plan.flops) == 0:
        return np.zeros((0, world_size))
    draws = np.arange(num_rounds * world_size)
    picks = random_words("independent", seed, np.array([plan.epoch]), draws) % np.uint64(len(plan.flops))
    return plan.flops[picks.astype(np.int64)].reshape(-1, world_size)


def mean_over_max(plan: EpochPlan) -> float | None:
    """Mean over max FLOPs across ranks, over the epoch: the share of the time in which ranks compute, not wait.

    None for an epoch without steps.
    """
    return _ratio(planned_rounds(plan))


def independent_balance(plan: EpochPlan, seed: int = 0, world_size: int | None = None) -> float | None:
    """What independent draws per rank would give, simulated; None for an epoch without steps."""
    return _ratio(independent_rounds(plan, SIMULATED_ROUNDS, world_size or plan.world_size, seed))


def in_words(share: float | None) -> str:
    """A share of time for people."""
    return "no steps" if share is None else f"{share:.1%}"


def rounded(share: float | None) -> float | None:
    """The same for programs."""
    return None if share is None else round(share, 6)


def _ratio(rounds: FloatArray) -> float | None:
    """Mean over max of [rounds, ranks], the rounds weighted by their length."""
    return float(rounds.mean(axis=1).sum() / rounds.max(axis=1).sum()) if rounds.size else None
