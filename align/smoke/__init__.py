"""The first thing to run on a machine: expected against measured, line by line, in fifteen minutes on a GPU."""
