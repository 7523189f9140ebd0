"""Benchmarks: what is timed, how, and the tables of the results. See README.md."""
