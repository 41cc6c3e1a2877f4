"""Compares this suite with other ways to train, and with what the machine can do. The suite never imports it."""
