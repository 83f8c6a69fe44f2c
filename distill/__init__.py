"""From a teacher and a recipe to a converted model."""
