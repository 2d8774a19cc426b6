"""The plan: which clip is trained at which size and length, on which rank, at which step."""
