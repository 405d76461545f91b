"""Carry addition: a verifiable task, whose reward is a Python function."""
