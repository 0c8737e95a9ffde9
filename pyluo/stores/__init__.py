"""Stores: sessions whose files have names, an order and metadata."""
