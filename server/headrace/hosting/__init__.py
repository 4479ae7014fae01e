"""The models that an API process serves: each an engine with its text side, one or by version."""
