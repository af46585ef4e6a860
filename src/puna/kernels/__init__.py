"""kernels multiply the numbers: ten operations, each with a NumPy reference and one or more fast forms."""
