"""Stages of fitting the embedded CLIP model; `scripts/fit_embedded_model.py` runs them in order."""
