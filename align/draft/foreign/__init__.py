"""Recipes from the configuration files of other tools.

Every key is mapped, mapped with a stated difference, reported as having no effect on the result, or reported as not
mapped with the reason.
"""
