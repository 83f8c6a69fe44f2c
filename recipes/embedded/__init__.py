"""The embedded default: a small pretrained teacher, the generator of its text and the script that trained it."""
