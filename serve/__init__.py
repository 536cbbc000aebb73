"""To whom: feature endpoints for tenants. Reserved for the serving layer; nothing is served yet."""
