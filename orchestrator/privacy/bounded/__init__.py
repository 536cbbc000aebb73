"""Bounded features: short vectors through a channel of known capacity, what it bounds, and who was told how much."""
