"""Measures an artifact: speed beside the limits of the same machine in the same run, load, memory, drafting."""
