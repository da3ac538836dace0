"""Loads an artifact and generates from it: draft, verify, trim, within a memory budget. Never imports torch or onnx."""
