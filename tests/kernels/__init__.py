"""Tests of the Metal kernels, each executed by tests/metal."""
