"""Runnable examples: data generators, reward functions and one YAML file per stage."""
