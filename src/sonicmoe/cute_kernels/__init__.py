"""Device code for Hopper in CuTe DSL. Speaks m, n, k and groups; imports neither torch nor anything above it."""
