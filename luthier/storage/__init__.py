"""Bytes: files and artifacts over obstore, manifests and digests."""
