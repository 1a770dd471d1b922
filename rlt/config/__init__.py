"""Configs: their shape, how they are composed and checked, and what they may build."""
