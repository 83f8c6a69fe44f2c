"""A teacher's k likeliest tokens at every counted position of a stage, on the disk: made once, read by many."""
