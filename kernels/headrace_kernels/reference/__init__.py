"""Every operation in plain torch: the specification, the oracle and the fallback."""
