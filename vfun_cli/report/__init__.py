"""``vfun report``: a run as one HTML page, made from its files alone.

``gather`` reads the files, ``meter`` condenses the numbers of the steps, ``charts`` draws curves, ``media`` puts in
pictures and videos, ``page`` writes the HTML.
"""
