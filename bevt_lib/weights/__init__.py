"""Weights in and out: other codes' names, loading, model folders, timm. Imports base and model."""
