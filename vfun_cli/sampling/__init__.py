"""One sampler for every family: from conditions to latents, to frames, to files."""
