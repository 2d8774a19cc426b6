"""One module a subcommand; bodies of a screenful, logic elsewhere."""
