"""Documents, packing, mixtures and their order."""
