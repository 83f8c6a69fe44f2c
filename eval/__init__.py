"""What was lost and what was won."""
