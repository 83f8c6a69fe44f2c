"""The embedded default: a small pretrained teacher, its text and the script that trained it."""
