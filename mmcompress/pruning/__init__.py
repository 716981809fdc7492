"""Structured pruning: whole units go, and what is left is a smaller model of the same kind.

``units`` counts (how many stay) and says which weights belong to a unit; ``criteria`` score the units; ``cut`` lets
Torch-Pruning's dependency graph cut them and rebuilds a stock module of the new size.
"""
