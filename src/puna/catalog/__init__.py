"""What Puna knows about the Llama family without asking anyone: names, sizes, licences, where each model is published,
who hosts it for how much, and what the licence of each says.

What it is: facts as data, and the arithmetic of choosing. It never opens a connection, and looks at the disk for its
own files and a person's `catalog.toml` only.
What it is not: a list of what is installed (`puna.weights.installed`), nor of what a checkpoint on disk really
contains (its own config decides).
"""
