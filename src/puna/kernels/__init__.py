"""kernels multiply the numbers: some twenty operations, each with a NumPy reference and one or more fast forms."""
