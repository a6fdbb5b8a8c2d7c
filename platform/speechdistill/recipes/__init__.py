"""Recipes: one kind of training each, model, data, loss and schedule. One file per recipe."""
