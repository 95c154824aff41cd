"""Branches of a recorded pass: x + F(x), and whole layers."""
