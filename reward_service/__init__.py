"""Scores <prompt, completion> pairs: scorers, the service that batches them, and reward-model training."""
