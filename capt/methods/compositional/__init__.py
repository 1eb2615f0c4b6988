"""Compositional zero-shot learning: models behind one interface, their scoring, training and runs.

``model`` is what every model offers, ``scoring`` streams images against the pairs of a world, ``training`` fits one
model, ``run`` does all models and seeds and writes the run folder.
"""
