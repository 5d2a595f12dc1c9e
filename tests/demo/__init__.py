"""`make demo`: a two-node cluster on this machine, shown at work."""
