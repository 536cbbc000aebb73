"""Sweeps: many trainings over omega, epsilon, split index and feature bits, and what they teach about one another."""
