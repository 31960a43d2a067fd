"""How accurate compressed classifiers are, after training of equal length."""
