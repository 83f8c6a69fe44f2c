"""What each mixer is, without torch: options, tensors, FLOPs, state."""
