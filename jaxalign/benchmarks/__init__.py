"""Measurements that are not tests: nothing here fails, it reports."""
