"""Training: collaborative models (cf.py), the two CoLLM stages (stages.py) and the one loop (loop.py)."""
