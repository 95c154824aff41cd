"""Data by name or path: what is in it, and which columns a task needs."""
