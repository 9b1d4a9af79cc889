"""A mixture of six sources that the project makes itself."""
