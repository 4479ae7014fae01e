"""The public operations: documentation, checks and dispatch."""
