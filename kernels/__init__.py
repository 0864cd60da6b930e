"""Triton kernels, installed as `collm_fast.kernels`. Floor F0: a module here imports torch and triton only."""
