"""Which branches and layers go, and what makes up for them."""
