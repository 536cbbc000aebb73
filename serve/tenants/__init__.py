"""Who may ask for what: tenants, devices and operators, their tokens, grants and quotas, and what they did."""
