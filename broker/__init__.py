"""The queue and the wire: everything that touches NATS, and the message types the services share."""
