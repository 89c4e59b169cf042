"""Pruning: what to remove, how, and the proof.

    stepwise          fxopt.prune: in one line, at once or in steps
    importance        scores of channels
    selection         which channels go; budget and latency: what a selection would cost
    computed_weights  weights that the graph computes, where they hold channels
    removal           cut the constants, mend the calls (mending), prove the result (oracle)
    record            what was done, for people
    constant_channels what is zero or constant already: dead_channels, readings, dead_removal
    sparsity          single weights
"""
