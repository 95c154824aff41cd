"""Channels followed through the operations of a recorded pass, and the sites that they make."""
