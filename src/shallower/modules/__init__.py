"""What stands in a model: layers, activations, and how they are exchanged."""
