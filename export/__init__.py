"""Turns a Hugging Face Gemma 4 checkpoint into an artifact the runtime can load."""
