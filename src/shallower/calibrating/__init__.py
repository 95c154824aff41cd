"""Statistics of a model on data: second moments, gradients, passes over batches."""
