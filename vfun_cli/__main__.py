"""``python -m vfun_cli``."""

from vfun_cli.main import main

main()
