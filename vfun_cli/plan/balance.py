"""How evenly a plan loads the ranks, beside what independent draws would do."""

import numpy as np

from vfun_cli.plan.draws import random_words
from vfun_cli.plan.schedule import EpochPlan, FloatArray

SIMULATED_ROUNDS = 2000
"""Steps of the simulation; the ratio is stable to about 0.003 with 8 ranks."""


def mean_over_max(plan: EpochPlan) -> float:
    """Mean over max FLOPs across ranks, over the epoch: the share of the time in which ranks compute, not wait.

    Ranks meet after every micro-batch (sharded weights are gathered in each forward pass), so each accumulation
    index counts on its own. 1.0 for an epoch without steps.
    """
    return _ratio(plan.flops[plan.steps].reshape(-1, plan.world_size))


def independent_balance(plan: EpochPlan, seed: int = 0, world_size: int | None = None) -> float:
    """The same figure if every rank drew its micro-batches on its own from this epoch's, simulated."""
    if len(plan.flops) == 0:
        return 1.0
    world_size = world_size or plan.world_size
    rounds = np.arange(SIMULATED_ROUNDS * world_size)
    picks = random_words("independent", seed, np.array([plan.epoch]), rounds) % np.uint64(len(plan.flops))
    return _ratio(plan.flops[picks.astype(np.int64)].reshape(-1, world_size))


def _ratio(rounds: FloatArray) -> float:
    """Mean over max of [rounds, ranks], the rounds weighted by their length."""
    return float(rounds.mean(axis=1).sum() / rounds.max(axis=1).sum()) if rounds.size else 1.0
