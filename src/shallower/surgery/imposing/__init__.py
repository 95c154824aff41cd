"""What becomes of channels, choices and branches, simulated on the original layers."""
