"""``python -m vfun_cli.acceptance``: the same as ``vfun acceptance``."""

import runpy
import sys

sys.argv[1:1] = ["acceptance"]
runpy.run_module("vfun_cli", run_name="__main__")
