"""Trials: do the forwards of a model follow when channels are cut, and the numbers that have to fall with them."""
