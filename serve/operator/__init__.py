"""The operator's page: what is served and how it does, and a live look at what each feature shows."""
