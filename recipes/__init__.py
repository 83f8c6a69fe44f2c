"""The typed recipe, its loader, the shipped YAML files and the runner."""
