"""Aligning a teacher that does not fit into memory: one decoder layer at a time, its inputs and outputs on the disk."""
