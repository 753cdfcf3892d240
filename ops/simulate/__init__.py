"""A fleet under a virtual clock: the dispatcher's decisions on engines that cost no time to wait for."""
