"""Multi-label classification of long-tailed data: models behind one interface, their training and runs.

``model`` is what every model offers, ``training`` fits one model, ``run`` does all models and seeds and writes the run
folder, ``prediction`` labels images.
"""
