"""Turns trajectories into weights: buffer, packing, PPO maths, FSDP policy and value, weight publisher."""
