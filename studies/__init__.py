"""The studies of this repository, and the tables and the plot of README and docs/ that only these studies can fill."""
