"""This suite beside its peers, and beside what the machine can do. Imports the suite; nothing imports it."""
