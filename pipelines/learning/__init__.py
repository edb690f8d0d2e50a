"""One optimiser loop for everything that learns at edit time."""
