"""Super-resolution: an EDSR-like network trained here, compressed by the same command as classifiers."""
