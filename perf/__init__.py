"""Benchmarks of sonicmoe: `python -m perf.run --help`. How they measure and how to read them: docs/perf.md."""
