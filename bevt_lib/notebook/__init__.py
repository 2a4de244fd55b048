"""Figures and widgets for the notebooks. Imports the rooms before it."""
