"""How often a smaller model answers otherwise than the original, with a bound."""
