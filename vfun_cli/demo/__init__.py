"""Tiny models in the released layouts and tiny real media, made on the spot."""
