"""Recipes written for the user: from a data file and a machine, or from another tool's configuration."""
