"""Checkpoints: where they come from and what their files hold."""
