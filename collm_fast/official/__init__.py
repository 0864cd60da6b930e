"""For users of the official CoLLM code: configurations (fields.py, launch.py), checkpoints (imports.py). Floor F4."""
