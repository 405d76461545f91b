"""Faults injected on purpose into real runs: `make chaos`."""
