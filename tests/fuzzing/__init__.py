"""Calls of the public functions with arguments of every kind, right and wrong, made by hypothesis."""
