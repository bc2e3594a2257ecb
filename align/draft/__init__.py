"""Write recipes from a data file and a machine (`align init`) or from another tool's file (`align import-recipe`)."""
