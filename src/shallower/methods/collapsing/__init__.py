"""LayerCollapse and Layer Folding: activations trained to be linear."""
