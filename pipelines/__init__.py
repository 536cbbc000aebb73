"""When things happen: the commands. Nothing that travels to a Ray worker is defined here."""
