"""A plan applied to a model, simulated, and proven."""
