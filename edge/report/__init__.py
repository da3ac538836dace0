"""One page about one model: what fits where, what was measured here, what is projected for stated devices."""
