"""The compiled loops of the response functions: plain arrays in, sums or deltas out."""
