"""CIFAR-10 (JPEG): its images, networks for it, and configurations of runs, for all benchmarks that use them."""
