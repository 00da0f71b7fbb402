"""Response functions: where one number per (example, unit) leads on to the loss, all weights of a unit share them.

The map, in reading order (a file imports only files above it):

    by_unit         sites sorted by the unit that they move
    loops/          the compiled loops
    way             straight ways from a parameter to the logits: heads, averaged convolutions, three Linears
    sparse_linear   a Linear on inputs that are mostly 0
    head            the intact classifier head on batches
    arrays          tensors handed to the compiled loops, cut over threads
    gpu_rows        whole rows of a head on a CUDA device
    rows            whole rows of a head
    direct          single weights of a head
    averaged        single weights and whole channels of an averaged convolution
    three_linears   whole rows in front of two more Linears
"""
