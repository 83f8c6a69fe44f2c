"""The commands, by what they are for: looking before the work, the work, and what came out of it."""
