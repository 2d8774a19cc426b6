"""``python -m vfun_cli``."""

from vfun_cli.entry import main

main()
