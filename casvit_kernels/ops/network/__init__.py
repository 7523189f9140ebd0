"""A whole CAS-ViT network in one call, for inference."""
