"""Turns prompts into trajectories: prompt stream, vLLM generator, rollout worker, weight receiver."""
