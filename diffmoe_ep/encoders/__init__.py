"""Frozen outside models that turn images and captions into what is trained on: loaded from local folders, never
downloaded.
"""
