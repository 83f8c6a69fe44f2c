"""Published architectures: which students they can express, and students written in their own formats."""
