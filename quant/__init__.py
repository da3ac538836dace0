"""Block-wise quantization of weights, in numpy, one chunk of rows at a time."""
