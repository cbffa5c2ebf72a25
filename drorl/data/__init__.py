"""Rows to train on: their schema, and the embedded data set."""
