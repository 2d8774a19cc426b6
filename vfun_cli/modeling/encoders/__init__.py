"""Frozen encoders that families share: pixels, text and sound to what a transformer reads."""
