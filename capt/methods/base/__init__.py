"""Base models f0: what CAPT starts from, each usable alone. One file a model; ``registry`` finds them by name."""
