"""The product in environments of the versions that its metadata allows: ``python -m tests.install.versions``."""
