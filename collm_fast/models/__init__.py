"""Models: the collaborative ones (cf/), the language model, its adapters, the mapper and their union. Floor F2."""
