"""One forward pass as a graph of calls."""
