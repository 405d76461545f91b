"""Support replies: a reward model learned from noisy preference pairs, and PPO against it."""
