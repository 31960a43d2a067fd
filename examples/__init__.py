"""Short scripts, one for every kind of network; docs/guide.md says which is which."""
