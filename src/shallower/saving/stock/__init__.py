"""Stock classes: whether one loads a saved model, and which numbers in its config it needs for that."""
