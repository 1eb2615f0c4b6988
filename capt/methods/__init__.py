"""The published methods, composed from modules: fit, predict, save, load."""
