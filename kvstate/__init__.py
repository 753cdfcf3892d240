"""Pure decisions about KV-cache space and prefill work. No I/O, nothing of ours imported."""
