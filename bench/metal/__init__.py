"""What bench.launches, bench.traffic and bench.kernels share.

strides, tracing, tally: launches of a traced graph; passes: the graphs that are counted; place,
matrices, activations, cases: our kernels at the models' shapes. Which kernels MLX calls, and what
the models are, is in the package: gemma_mtp_mlx.dispatch and gemma_mtp_mlx.families.
"""
