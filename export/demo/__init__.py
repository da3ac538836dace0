"""A small Gemma 4 target and drafter, trained from nothing: the pair that examples and tests run on."""
