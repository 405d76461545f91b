"""Scores <prompt, completion> pairs: scorers, the service that batches them, reward training."""
