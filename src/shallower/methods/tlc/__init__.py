"""Till the Layers Collapse: activations removed one after another, and layers merged."""
