"""From what a family reads to what its encoders give, with the cache of it."""
