"""What knows tensors and processes but no model of ours: batches, memory, files, text, linear algebra."""
