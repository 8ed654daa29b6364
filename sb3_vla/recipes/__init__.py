"""Recipes: the schema of a run's settings, and what becomes of them."""
