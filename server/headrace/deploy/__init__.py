"""Headrace as a Ray Serve application."""
