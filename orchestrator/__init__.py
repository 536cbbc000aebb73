"""The library: how privacy-cognizant features are trained, published and measured."""
