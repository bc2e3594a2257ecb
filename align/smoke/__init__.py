"""Test a new machine with `align smoke`: compare measured with expected values, in about fifteen minutes on a GPU."""
