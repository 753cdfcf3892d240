"""Pure decisions about KV-cache space, prefill work and cached prefixes. No I/O, nothing of ours imported."""
