"""Finite differences carried through any operation: exact for any target in any network, many sites at once.

The map, in reading order (a file imports only files above it):

    series            the loss change as a power series in one number
    linear_relu       compiled loops of a Linear and the ReLU behind it
    representations   how a delta is stored where it has structure
    shadows           where deltas are kept: beside each storage
    tape              the matrix products of the intact network, computed once per batch
    dispatch          the dispatch mode: every operation runs, with the deltas beside it
    rules             how each operation carries a change
    products          how Linear and convolution carry a change
    finite            the path `finite`
"""
