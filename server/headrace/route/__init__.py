"""The front door: one address for many models and many replicas. It relays bytes."""
