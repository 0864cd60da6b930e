"""Files of a run: atomic writes, checkpoints, PEFT adapter folders. No model code lives here."""
