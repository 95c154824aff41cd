"""From a model to its sites."""
