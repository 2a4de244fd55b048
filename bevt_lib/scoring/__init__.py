"""What a model is worth and what a run costs. Imports the rooms before it."""
