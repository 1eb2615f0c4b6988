"""One file per format a data set can be stored in."""
