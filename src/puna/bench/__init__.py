"""bench measures a model on this machine, and other engines beside it; `puna.cli.bench` shows what it finds."""
