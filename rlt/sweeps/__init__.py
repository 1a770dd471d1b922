"""Sweeps: the jobs of one command as arms and seeds, and the page that compares them."""
