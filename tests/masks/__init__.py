"""Proof of the loss masks: random conversations through many chat templates, against independent constructions."""
