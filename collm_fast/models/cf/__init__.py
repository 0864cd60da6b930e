"""Collaborative models: MF (mf.py), LightGCN (lightgcn.py), and what a fit leaves of one (frozen.py). Floor F2."""
