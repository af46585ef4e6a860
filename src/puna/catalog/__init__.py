"""What Puna knows about the Llama family without asking anyone: names, sizes, licences, where each model is published.

What it is: facts as data. It never opens a connection and never looks at the disk beyond its own package.
What it is not: a list of what is installed (`puna.weights.installed`), nor of what a checkpoint on disk really
contains (its own config decides).
"""
