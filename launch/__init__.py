"""Recipes and what starts them.  Nothing here imports torch: a recipe is read and dry-run on a laptop or login node."""
