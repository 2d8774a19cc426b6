"""``vfun acceptance``: proof that vfun trains right on this machine, by runs of the demo through the real launcher."""
