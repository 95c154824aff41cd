"""Published ways to choose channels, on the same sites, data and surgery as this project's own."""
