"""Attackers who want the image back: what a feature still shows of the picture it was made from."""
