"""Choosing the layers that keep their attention, by scores of one aligned all-linear student."""
