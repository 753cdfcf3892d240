"""Which worker runs which request, and when: pure decisions over what workers say of themselves."""
