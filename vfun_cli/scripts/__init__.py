"""The launch scripts of the original trainers, read as text and never run, and what they mean to vfun."""
