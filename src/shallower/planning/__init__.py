"""What is to happen to a model, as data: plans, forms, costs, targets."""
