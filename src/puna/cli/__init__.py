"""cli types it for you: the `puna` command, one small module a subcommand, found by `main.py` when it is asked for."""
