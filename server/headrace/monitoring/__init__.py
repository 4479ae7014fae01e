"""Dashboard, alerts and Datadog configuration, made from the tables of metric names."""
