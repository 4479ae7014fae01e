"""Token ids to token ids: scheduling, the paged KV cache, running the model, sampling."""
