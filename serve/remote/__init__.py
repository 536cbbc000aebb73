"""Training with a tenant that is elsewhere: its process holds the head, the producer's session drives it over HTTP."""
