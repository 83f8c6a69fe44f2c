"""The student as transformers sees it: its config, cache and model. Also the source of every exported folder."""
