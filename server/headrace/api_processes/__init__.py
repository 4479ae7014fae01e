"""HTTP in, server-sent events out; imports no torch."""
