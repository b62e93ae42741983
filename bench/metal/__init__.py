"""What bench.launches, bench.traffic and bench.kernels share.

dispatch: which of its kernels MLX launches; strides, tracing, tally: launches of a traced graph;
models, passes: the graphs that are counted; place, matrices, activations, cases: our kernels at the
models' shapes.
"""
