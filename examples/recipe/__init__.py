"""The parts of `train_classification.py`, each about one thing."""
