"""Device code of the kernels whose time is that of their bytes: sums of rows, and everything of routing."""
