"""Algorithms that make a model smaller."""
