"""`relinear report`: what a run's files say, as one page that needs nothing beside it. Torch-free."""
