"""Answers generated for a data set's problems, and how many of them are right."""
