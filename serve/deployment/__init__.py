"""Bringing tasks to their endpoints: what is to be served, the cluster that serves it, how one becomes the other."""
