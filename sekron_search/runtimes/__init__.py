"""What networks run in: one interface, one adapter per third party."""
