"""Adapters to other trainers, one file a host: they rename tensors and masks, no formula."""
