"""What replaces attention."""
