"""Random numbers by position, for whole columns at once: splitmix64 over (seed, epoch, row, copy, purpose).

A draw depends on nothing else, so neither the number of ranks nor the order of the clips changes it.
The mixing function is Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014).
"""

import numpy as np
from numpy.typing import NDArray

from vfun_cli.metadata.table import IntArray

Words = NDArray[np.uint64]

PURPOSES = {"size": 1, "order": 2, "frames": 3, "step": 4, "independent": 5, "repeats": 6, "aspect": 7}


def mix(words: Words) -> Words:
    """One splitmix64 step of each 64-bit word."""
    words = words + np.uint64(0x9E3779B97F4A7C15)
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def random_words(purpose: str, seed: int, *positions: IntArray) -> Words:
    """A 64-bit word for each entry of the broadcast positions; different purposes are independent."""
    # Arrays throughout: numpy wraps unsigned arrays silently, but warns about scalars.
    words = mix(np.array([seed % 2**64], dtype=np.uint64) ^ mix(np.array([PURPOSES[purpose]], dtype=np.uint64)))
    for position in positions:
        words = mix(words ^ mix(np.atleast_1d(position).astype(np.uint64)))
    return words


def uniform(purpose: str, seed: int, *positions: IntArray) -> NDArray[np.float64]:
    """Floats in [0, 1) with 53 random bits."""
    return (random_words(purpose, seed, *positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53
