"""To whom: feature endpoints for tenants, and what brings them up."""
