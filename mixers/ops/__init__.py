"""The recurrences as pure functions on tensors."""
