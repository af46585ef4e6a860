"""kernels multiply the numbers: nine operations, each with a NumPy reference and one or more fast forms."""
