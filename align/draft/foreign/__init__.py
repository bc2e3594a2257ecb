"""Recipes from the configuration files of other tools.

Every key is mapped, mapped with a stated difference, without effect on the result, or listed with the reason why it is
not mapped."""
