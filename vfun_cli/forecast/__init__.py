"""Will it fit, and how long will it take: memory, time and money of a run before a GPU is booked.

``measuring`` runs a model without weights on a made-up GPU, in a process of its own; everything else reads what it
found, and imports neither torch nor numpy.
"""
